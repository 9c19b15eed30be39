"""torch's record of collectives: requested while one hangs, it names that collective."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.cluster import flight

# A real gloo group of two ranks, as threads; the first joins once the second's wait has been recorded.
GROUP = """
import os, sys, threading, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from recipes.cluster import flight

store, groups = dist.HashStore(), {}
def join(rank): groups[rank] = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
def share(rank): groups[rank].broadcast(torch.ones(3), 0).wait()
for target, ranks in ((join, (0, 1)), (share, (1,))):
    threads = [threading.Thread(target=target, args=(rank,)) for rank in ranks]
    for thread in threads: thread.start()
    if target is join:
        for thread in threads: thread.join()
attempt = Path(sys.argv[1])
assert flight.records(attempt) == []
descriptor = flight.listen(attempt / flight.DIRECTORY, 1)
for _ in range(300):
    os.write(descriptor, b"1"); time.sleep(0.1)
    if any("gloo:broadcast" in path.read_text() for path in flight.records(attempt)): break
os.close(descriptor)
share(0)
threads[0].join()
"""


def test_what_a_rank_waits_in_is_written_when_asked_for(tmp_path: Path) -> None:
    environment = os.environ | {"TORCH_FR_BUFFER_SIZE": "100"}
    subprocess.run([sys.executable, "-c", GROUP, str(tmp_path)], check=True, env=environment, timeout=120)
    (file,) = flight.records(tmp_path)
    assert file == tmp_path / "flight" / "rank1.json"
    waits = [entry for entry in json.loads(file.read_text())["entries"] if not entry["retired"]]
    assert [(entry["profiling_name"], entry["output_sizes"]) for entry in waits] == [("gloo:broadcast", [[3]])]


def test_a_torch_without_records_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "DUMPS", ("_no_such_dump",))
    descriptor = flight.listen(tmp_path / flight.DIRECTORY, 0)
    os.write(descriptor, b"1")
    os.close(descriptor)
    time.sleep(0.05)
    assert flight.records(tmp_path) == []
