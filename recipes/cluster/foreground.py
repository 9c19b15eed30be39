"""Stands between a terminal and torchrun, so that Ctrl-C means the same with many ranks as with one.

torchrun kills ranks that are not done 30 s after a signal, however long their step is, and takes a second one for a
reason to wait again. So it runs in a session of its own, and this process hands the first signal to the ranks alone:
they end after their step, with a checkpoint. A second one reaches them as Ctrl-C, and ends what is left soon after.
torchrun dies with this process, and the ranks die with torchrun (`recipes.launch.follow_torchrun`).

Started as ``python foreground.py COMMAND...`` (by path, standard library only: it costs no memory worth counting).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1  # linux/prctl.h
GRACE_S = 3.0  # seconds between the second signal and SIGKILL
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


def children(pid: int) -> list[int]:
    """Process ids of a process's children, whichever of its threads started them."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
    except OSError:
        pass  # it ended meanwhile
    return found


def run(command: Sequence[str]) -> int:
    """Run the command until it ends; its exit status, or that of an interrupted command."""
    libc, here = ctypes.CDLL(None), os.getpid()

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != here:
            os._exit(1)

    process = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent)
    asked = 0

    def hand_on(number: int, _: object) -> None:
        nonlocal asked
        asked += 1
        ranks = children(process.pid)
        if not ranks or asked > 2:
            return process.kill()
        for pid in ranks:
            try:
                os.kill(pid, number if asked == 1 else signal.SIGINT)
            except ProcessLookupError:
                continue
        if asked == 2:
            signal.setitimer(signal.ITIMER_REAL, GRACE_S)
        return None

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, hand_on)
    signal.signal(signal.SIGALRM, lambda *_: process.kill())
    status = process.wait()
    return INTERRUPTED if asked and status < 0 else 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
