"""The process of a heartbeat: `python -I -S beat.py PID DESCRIPTOR FILE SETTINGS`, as `heartbeat.start` starts it.

It is started by path with the standard library only, so that it costs little memory and lives whatever happens to the
environment of the rank.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by path: the packages are not found otherwise

from recipes.cluster.heartbeat import SIZE, Heart  # noqa: E402
from recipes.cluster.watch import Guard  # noqa: E402


def main() -> None:
    pid, descriptor, path, settings = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank
    woken: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: woken.append(number))  # Slurm, too, sends it to a whole step
    heart = Heart(pid, mmap.mmap(descriptor, 0, prot=mmap.PROT_READ), settings)
    interval = min(5.0, settings["hang_s"] / 12)
    guard = Guard(Path(path).parents[1], settings["guarded_ranks"]) if settings["guarded_ranks"] else None
    while True:
        beat = heart.beat()
        with contextlib.suppress(OSError):  # a full disk
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.pwrite(file, json.dumps(beat).encode()[: SIZE - 1].ljust(SIZE - 1) + b"\n", 0)
            os.close(file)
        if os.getppid() != pid or beat["phase"] == "end":
            return
        if guard is not None:
            guard.look(interval)
        for _ in range(max(1, round(interval / 0.25))):
            time.sleep(min(interval, 0.25))
            if os.getppid() != pid or woken:
                break
        woken.clear()


if __name__ == "__main__":
    main()
