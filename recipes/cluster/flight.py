"""torch's record of a rank's collectives, written once an operation takes long: which one it is in, which came before.

torch calls it the flight recorder. With NCCL its watchdog writes a file of its own to the same directory when a
collective times out, or when asked through a pipe (slurm/task.sh sets both up; `torchfrtrace` reads those files). With
gloo nothing does, but torch hands the record out as text, from 2.8 on; that needs a living interpreter. Sources:
torch/csrc/distributed/c10d/{FlightRecorder.hpp,init.cpp}.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

DIRECTORY = "flight"  # in the attempt's directory
# Arguments: with collectives, only those that are not done. Private in torch; another version may have neither.
DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")


def listen(directory: Path, rank: int) -> int:
    """Write ``directory/rankN.json`` whenever a byte arrives at the descriptor that is returned."""
    reader, writer = os.pipe()
    threading.Thread(target=_serve, args=(reader, directory / f"rank{rank}.json"), daemon=True).start()
    return writer


def records(attempt: Path) -> list[Path]:
    """Whatever was recorded in an attempt: ours, and NCCL's."""
    return sorted(path for path in (attempt / DIRECTORY).glob("*") if path.is_file() and path.stat().st_size)


def _serve(reader: int, file: Path) -> None:
    while os.read(reader, 1):
        try:
            for dump in _dumps():
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(dump(True, False))
        except (OSError, RuntimeError) as error:  # a full disk: the rank goes on, and so does its heartbeat
            print(f"no record of collectives: {error}", flush=True)


def _dumps() -> list[Callable[[bool, bool], bytes]]:
    """The first one that this torch has."""
    from torch._C import _distributed_c10d as c10d

    return [getattr(c10d, name) for name in DUMPS if hasattr(c10d, name)][:1]
