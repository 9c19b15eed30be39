"""Processes of one node that read the same files check each file once, together.

The workers of a tensor-parallel server, and all servers of a node, map the same pages: a file that one of them has
hashed is the file that the others load. Each file has a stamp in a private directory in memory. The first process to
lock the stamp checks the file and writes the stamp; the others find it. So each node reads a shared file system once,
with one process per file at a time. Without such a directory every process checks by itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

MEMORY = Path("/dev/shm")
DAY_S = 86400.0
VALID_S = 120.0  # a file may be damaged later; a server that comes back after so long checks anew


class Checks:
    """Stamps for the files of one update.

    Args:
        directory: of the files.
        update: names the update, its checksum included: files are written again in place.
    """

    def __init__(self, directory: Path, update: str) -> None:
        self._directory, self._update = directory, update
        self._stamps = stamp_directory(directory)

    def run(self, files: Sequence[str], check: Callable[[str], None]) -> None:
        """Every file is checked by this process or another one, with ``check``, whose error is raised.

        Files that another process checks at the moment are left for last. One that fails gets no stamp: every process
        finds the damage by itself.
        """
        if self._stamps is None:
            for file in files:
                check(file)
            return
        first = os.getpid() % max(len(files), 1)
        busy = [file for file in (*files[first:], *files[:first]) if not self._one(file, check, wait=False)]
        for file in busy:
            self._one(file, check, wait=True)
        self._forget_others()

    def _one(self, file: str, check: Callable[[str], None], *, wait: bool) -> bool:
        """False when another process is at it, and ``wait`` is."""
        assert self._stamps is not None
        at = (self._directory / file).stat()
        expected = f"{self._update} {at.st_dev} {at.st_ino} {at.st_size}".encode()
        fd = os.open(self._stamps / file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return False
            recent = time.time() - os.fstat(fd).st_mtime < VALID_S
            if not (recent and os.pread(fd, len(expected) + 1, 0) == expected):
                os.ftruncate(fd, 0)
                check(file)
                os.pwrite(fd, expected, 0)
            return True
        finally:
            os.close(fd)  # and with it the lock, also when this process is killed

    def _forget_others(self) -> None:
        """Stamps of runs that ended: theirs are a day old, and nobody holds them."""
        assert self._stamps is not None
        for other in self._stamps.parent.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process does the same
                if other != self._stamps and time.time() - other.stat().st_mtime > DAY_S:
                    shutil.rmtree(other, ignore_errors=True)


def stamps_of(staged: Path) -> Path:
    return MEMORY / f"megatron-gppo-checked-{os.getuid()}" / staged.name


def stamp_directory(directory: Path) -> Path | None:
    """This user's private directory for stamps of files in ``directory``; None when there cannot be one."""
    path = stamps_of(directory.parent)  # where versions are staged (`disk.DiskSync`): the same for all of them
    try:
        for made in (path.parent, path):
            made.mkdir(mode=0o700, exist_ok=True)
            about = made.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
                return None
        os.utime(path)
    except OSError:
        return None
    return path
