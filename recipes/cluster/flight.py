"""torch's record of a rank's collectives (the flight recorder), written when an operation takes long.

With NCCL, torch's watchdog writes its own file to the same directory when a collective times out, or on request through
a pipe (slurm/task.sh sets up both; `torchfrtrace` reads those files). With gloo there is no such file, but from 2.8 on
torch returns the record as text, which needs a running interpreter. Sources:
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
