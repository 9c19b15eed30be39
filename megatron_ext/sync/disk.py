"""Weight transport through files: safetensors in a private directory that learner and servers both see.

Memory-backed (/dev/shm) when the servers run on this host. The servers go on generating while tensors are staged; they
are paused only once the files are complete. The files stay until the next version: a server that comes back reads them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 1 << 30  # staged host memory is bounded by one shard
PREFIX = "megatron-gppo-weights-"


class DiskSync:
    """`WeightSync` by files.

    Args:
        parent: directory in which a private (0700) one is made; default /dev/shm if it has room, else the system's
            temporary directory. Servers on other hosts need a shared file system here.
        need_bytes: room that one update takes, for the choice of the default.
    """

    def __init__(self, parent: Path | None = None, need_bytes: int = 0) -> None:
        parent = parent or default_parent(need_bytes)
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        self.root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # mkdtemp gives mode 0700
        self._lock_fd = os.open(self.root / "lock.new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        (self.root / "lock.new").rename(self.root / "lock")  # never visible unlocked
        self._stage: Path | None = None
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[str] = []
        self.info: dict[str, Any] | None = None

    def begin(self, version: int) -> None:
        self.discard()
        self._stage = self.root / f"v{version:06d}"
        self._stage.mkdir(mode=0o700)
        self._pending, self._pending_bytes, self._files = {}, 0, []

    def send(self, name: str, tensor: Tensor) -> None:
        """Stage a copy of one tensor."""
        assert self._stage is not None, "send() before begin()"
        # A sender may reuse its buffer (a gather per layer does), and a shard is written later than it is sent.
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += tensor.numel() * tensor.element_size()
        if self._pending_bytes >= SHARD_BYTES:
            self._flush()

    def seal(self, version: int, checksum: str) -> None:
        self._flush()
        self.info = {"directory": str(self._stage), "files": self._files, "version": version, "checksum": checksum}

    def discard(self) -> None:
        self.info, self._pending = None, {}
        if self._stage is not None:
            shutil.rmtree(self._stage, ignore_errors=True)
            self._stage = None

    def connect(self, urls: Sequence[str], workers: Sequence[int], timeout_s: float) -> list[dict[str, Any]]:
        """Files need no connection."""
        return []

    def join(self) -> None:
        """Nobody to wait for."""

    def feed(self) -> None:
        """The workers read by themselves."""

    def close(self) -> None:
        """Remove the private directory; safe to call twice."""
        shutil.rmtree(self.root, ignore_errors=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _flush(self) -> None:
        if not self._pending:
            return
        assert self._stage is not None
        name = f"shard-{len(self._files):05d}.safetensors"
        save_file(self._pending, self._stage / name)
        self._files.append(name)
        self._pending, self._pending_bytes = {}, 0


def default_parent(need_bytes: int) -> Path:
    """Memory if it has room (containers often get 64 MiB of /dev/shm), else the disk."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > need_bytes
    return memory if roomy else Path(tempfile.gettempdir())


def remove_abandoned(parent: Path) -> None:
    """Delete what a killed run left behind: directories of ours whose lock nobody holds."""
    for root in parent.glob(PREFIX + "*"):
        if root.stat().st_uid != os.getuid() or not (root / "lock").exists():
            continue
        fd = os.open(root / "lock", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(root, ignore_errors=True)
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(fd)
