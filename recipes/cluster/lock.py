"""The lock of a run directory: it names its holder, ends with it, and is not inherited by child processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from recipes.cluster.attempt import VARIABLE
from recipes.cluster.heartbeat import DIRECTORY

FILE = ".lock"
# A requeued job may find the lock still held, by a process that is ending, or by a file server that waits for a dead
# node to return.
WAIT_S = 120.0
FOREIGN_S = 12.0  # two heartbeats and a file server's delay
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def _close_in_child() -> None:
    # Megatron forks writers for a checkpoint, and a writer that outlives a killed trainer would keep holding the lock.
    for file in list(_held):
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


class RunBusy(RuntimeError):
    """A process of this job, or one whose host does not answer, still holds the run directory."""


@dataclass(frozen=True)
class Holder:
    """The holder of a run directory."""

    pid: int
    host: str
    job: str = ""  # of Slurm
    attempt: str = ""  # directory of its logs

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (Slurm job {self.job})" if self.job else "")


def holder(run_dir: Path) -> Holder | None:
    """The last holder that has not released the lock; None if there is none."""
    try:
        return Holder(**json.loads((run_dir / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_locked(run_dir: Path) -> bool:
    """Whether a process holds the lock, as far as this file system can tell."""
    try:
        with (run_dir / FILE).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def take(run_dir: Path) -> IO[str]:
    """Lock a run directory until `release`, or the end of this process.

    Under Slurm a holder is waited for, since only a leftover of this job can be one (`recipes.cluster.job` has refused
    others): RunBusy names it. Elsewhere ValueError does so at once.
    """
    under_slurm = VARIABLE in os.environ
    file = (run_dir / FILE).open("a+", encoding="utf-8")
    deadline = time.monotonic() + (WAIT_S if under_slurm else 0.0)
    while not _flock(file):
        if time.monotonic() >= deadline:
            who = holder(run_dir) or "another process"
            file.close()
            if under_slurm:
                raise RunBusy(f"run.dir={run_dir} is still held by {who} after {WAIT_S:.0f} s: end it there")
            raise ValueError(f"run.dir={run_dir} is in use by {who}; wait or choose another")
        time.sleep(1.0)
    before = holder(run_dir)
    if before is not None and before.host != socket.gethostname() and _beats(before):
        file.close()  # a file system whose locks hold on one node only
        raise ValueError(f"run.dir={run_dir} is in use by {before}; wait or choose another")
    _write(file, Holder(os.getpid(), socket.gethostname(), os.environ.get("SLURM_JOB_ID", "")))
    _held.add(file)
    return file


def told(file: IO[str], attempt: Path) -> None:
    """Record the path of this process's heartbeat in the lock."""
    slurm = os.environ.get("SLURM_JOB_ID", "")
    _write(file, Holder(os.getpid(), socket.gethostname(), slurm, str(attempt.absolute())))


def _write(file: IO[str], mine: Holder) -> None:
    file.truncate(0)
    file.write(json.dumps(asdict(mine)) + "\n")
    file.flush()


def release(file: IO[str]) -> None:
    """Release the lock."""
    _held.discard(file)
    file.truncate(0)
    file.close()


def _flock(file: IO[str]) -> bool:
    """File systems without locks (Lustre, unless mounted with `flock`) are taken as they are: True."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    return True


def _beats(other: Holder) -> bool:
    """Whether the other process is alive: its heartbeat changes."""
    file = Path(other.attempt) / DIRECTORY / "rank0.json"

    def beat() -> str:
        try:
            return file.read_text(encoding="utf-8")
        except OSError:
            return ""

    if '"end"' in (first := beat()) or not first:
        return False
    deadline = time.monotonic() + FOREIGN_S
    while time.monotonic() < deadline:
        if beat() != first:
            return True
        time.sleep(0.5)
    return False
