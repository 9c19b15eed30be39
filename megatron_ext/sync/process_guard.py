"""Run a command and end all of its processes, even if the parent is killed with SIGKILL.

Started as ``python process_guard.py PARENT_PID COMMAND...`` (by path, standard library only: it starts in
milliseconds). vLLM's engine is a grandchild that outlives a killed API server, so killing one process is not enough:
this guard is a "subreaper", every orphan among its descendants becomes its child, and it ends only when all are reaped.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
# Between SIGTERM and SIGKILL; vLLM removes its shared memory on SIGTERM.
GRACE_S = float(os.environ.get("GUARD_GRACE_S", "5"))
POLL_S = 0.5


def descendants() -> list[int]:
    """Process ids below this one, at any depth, zombies included."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                    parents[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue  # ended meanwhile
    found, grew = {os.getpid()}, True
    while grew:
        new = {pid for pid, parent in parents.items() if parent in found} - found
        found, grew = found | new, bool(new)
    return sorted(found - {os.getpid()})


def reap() -> None:
    """Collect every child that has ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def kill_all(child: int) -> None:
    """SIGTERM to the command, then SIGKILL to all that is left, until nothing is."""
    deadline = time.monotonic() + GRACE_S
    _signal(child, signal.SIGTERM)
    while descendants() and time.monotonic() < deadline:
        time.sleep(0.05)
        reap()
    while rest := descendants():
        for pid in rest:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.02)
        reap()


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def main() -> int:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    # Only a wake-up: it also arrives when a mere thread of the parent ends, so the loop asks for the parent itself.
    signal.signal(signal.SIGUSR1, lambda *_: None)
    prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    asked = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, asked | {signal.SIGCHLD, signal.SIGUSR1})

    def before_exec() -> None:  # single-threaded here, so this is safe
        signal.pthread_sigmask(signal.SIG_UNBLOCK, asked | {signal.SIGCHLD, signal.SIGUSR1})
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    server = subprocess.Popen(command, preexec_fn=before_exec, start_new_session=True)
    while server.poll() is None and os.getppid() == parent:
        got = signal.sigtimedwait(asked | {signal.SIGCHLD, signal.SIGUSR1}, POLL_S)
        if got is not None and got.si_signo in asked:
            break
    kill_all(server.pid)
    return server.returncode if server.returncode is not None else -signal.SIGTERM


if __name__ == "__main__":
    sys.exit(main() & 0xFF)
