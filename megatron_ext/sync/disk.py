"""Weight transport through files: safetensors in a private directory that learner and servers both see.

Memory-backed (/dev/shm) when the servers run on this host. The servers go on generating while tensors are staged; they
are paused only once the files are complete. The files stay until the next version: a server that comes back reads them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.sync.base import take_pages
from megatron_ext.sync.node import stamps_of

SHARD_BYTES = 1 << 30
HEADER_BYTES = 256 << 10  # of a file, for some 2000 tensors
ENTRY_BYTES = 200  # of a header, at most, for one tensor without its name
MEMORY = Path("/dev/shm")
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}  # their names in a safetensors header
PREFIX = "megatron-gppo-weights-"


class DiskSync:
    """`WeightSync` by files.

    Memory-backed files are written again in place for the next version: fresh pages cost seven times the copy. A worker
    that still reads the version before, because it was given up, then reads mixed bytes; it serves nothing before it
    has confirmed a later version.

    Args:
        parent: directory in which a private (0700) one is made; default /dev/shm if it has room, else the system's
            temporary directory. Servers on other hosts need a shared file system here.
        need_bytes: room that one update takes, for the choice of the default.
        digest: kind of `WeightDigest`.
        delta: workers keep layers that have not changed since their last update. Not for servers that sleep between
            updates and forget their weights.
    """

    def __init__(
        self, parent: Path | None = None, need_bytes: int = 0, digest: str = "xxh3", *, delta: bool = False
    ) -> None:
        self.digest, self._delta = digest, delta
        self.root, self._lock_fd = private_directory(parent or default_parent(need_bytes))
        self._in_memory = in_memory(self.root)
        self.stage: Path | None = None  # directory of the version
        self._files = Files("shard")
        self._others: list[str] = []  # files that other ranks wrote
        self.info: dict[str, Any] | None = None

    def begin(self, version: int) -> None:
        stage = self.root / f"v{version:06d}"
        if self._in_memory and self.stage is not None:
            self.info = None
            if stage != self.stage:
                self.stage.rename(stage)
        else:
            self.discard()
            stage.mkdir(mode=0o700)
        self.stage, self._others = stage, []
        self._files.begin(stage)

    def send(self, name: str, tensor: Tensor) -> Tensor:
        """Stage a copy of one tensor: one copy, into the file itself where that is in memory."""
        return self._files.put(name, tensor)

    def adopt(self, files: Sequence[str]) -> None:
        """Files in `stage` that other ranks wrote belong to the version."""
        self._others += files

    def seal(self, version: int, checksum: str, manifest: Mapping[str, str]) -> None:
        files = [*self._files.end(), *self._others]
        self.info = {"directory": str(self.stage), "files": files, "version": version, "checksum": checksum}
        self.info |= {"digest": self.digest, "tensors": dict(manifest), "delta": self._delta}

    def discard(self) -> None:
        self.info = None
        self._files.clear()
        if self.stage is not None:
            shutil.rmtree(self.stage, ignore_errors=True)
            self.stage = None

    def connect(self, urls: Sequence[str], workers: Sequence[int], timeout_s: float) -> list[dict[str, Any]]:
        """Files need no connection."""
        return []

    def join(self) -> None:
        """Nobody to wait for."""

    def feed(self) -> None:
        """The workers read by themselves."""

    def free(self) -> None:
        """Nothing is on the GPU."""

    def close(self) -> None:
        """Remove the private directory; safe to call twice."""
        self.discard()
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.rmtree(stamps_of(self.root), ignore_errors=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


class Files:
    """The safetensors files that one process writes of a version, called ``prefix-00000.safetensors`` and so on."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._stage: Path | None = None
        self._shards: list[Shard] = []
        self._spare: list[Shard] = []  # in memory, from the version before

    def begin(self, stage: Path) -> None:
        """Start a version in the directory ``stage``, which may be that of the version before under a new name."""
        kept: list[Shard] = []
        for shard in (*self._shards, *self._spare):
            if in_memory(stage) and (stage / shard.name).exists():
                kept.append(shard)
            else:
                shard.close()
        self._stage, self._shards, self._spare = stage, [], kept

    def put(self, name: str, tensor: Tensor) -> Tensor:
        """Append a copy of the tensor, which is returned."""
        assert self._stage is not None, "put() before begin()"
        if not self._shards or not self._shards[-1].takes(name, tensor):
            if self._shards:
                self._shards[-1].finish()
            nbytes = max(SHARD_BYTES, tensor.nbytes)
            if self._spare and self._spare[0].capacity >= nbytes:
                shard = self._spare.pop(0)
                shard.begin()
            else:
                self._remove_spare()
                file = f"{self._prefix}-{len(self._shards):05d}.safetensors"
                shard = Shard(file, self._stage, nbytes, in_memory(self._stage))
            self._shards.append(shard)
        return self._shards[-1].put(name, tensor.detach())

    def end(self) -> list[str]:
        """The version is complete; returns its files."""
        if self._shards:
            self._shards[-1].finish()
        self._remove_spare()
        return [shard.name for shard in self._shards]

    def _remove_spare(self) -> None:
        for shard in self._spare:
            shard.close()
            if self._stage is not None:
                (self._stage / shard.name).unlink(missing_ok=True)
        self._spare = []

    def clear(self) -> None:
        """Give up all memory; the files stay."""
        for shard in (*self._shards, *self._spare):
            shard.close()
        self._shards, self._spare = [], []


class Shard:
    """One safetensors file being written, with its data at a fixed offset: the header before it comes last.

    In memory the file is mapped and stays so for the versions that follow; else it is written and closed.
    """

    def __init__(self, name: str, directory: Path, capacity: int, mapped: bool) -> None:
        self.name, self.capacity = name, capacity
        self._fd = os.open(directory / name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._map: Tensor | None = None
        self._written = 0  # bytes of the map that have pages
        self._pinned = 0  # bytes of the map that are registered with the GPU's driver
        if mapped:
            os.ftruncate(self._fd, HEADER_BYTES + capacity)  # takes no memory yet
            self._map = torch.frombuffer(mmap.mmap(self._fd, HEADER_BYTES + capacity), dtype=torch.uint8)
        self.begin()

    def begin(self) -> None:
        """Empty, for a new version."""
        self._entries: dict[str, dict[str, Any]] = {}
        self._end = self._header = 0
        if self._map is not None:
            os.ftruncate(self._fd, HEADER_BYTES + self.capacity)

    def takes(self, name: str, tensor: Tensor) -> bool:
        """Whether the tensor still fits: a safetensors file has no gaps, so every tensor must be aligned by itself."""
        fits = self._end + tensor.nbytes <= self.capacity and self._end % tensor.element_size() == 0
        return fits and self._header + len(name) + ENTRY_BYTES <= HEADER_BYTES

    def put(self, name: str, tensor: Tensor) -> Tensor:
        """Append a copy of the tensor, which is returned."""
        start, self._end = self._end, self._end + tensor.nbytes
        self._header += len(name) + ENTRY_BYTES
        dtype = DTYPES[tensor.dtype]
        self._entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, self._end]}
        if self._map is not None:
            place = self._map[HEADER_BYTES + start : HEADER_BYTES + self._end]
            if self._end > self._written:
                take_pages(place)
                self._written = self._end
            placed = place.view(tensor.dtype).reshape(tensor.shape)
            placed.copy_(tensor)
            return placed
        host = tensor.cpu().contiguous()
        if host.nbytes:
            _write(self._fd, host.reshape(-1).view(torch.uint8).numpy().data, HEADER_BYTES + start)
        return host

    def finish(self) -> None:
        """Write the header; the file is whole after this."""
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        size = HEADER_BYTES - 8
        os.pwrite(self._fd, size.to_bytes(8, "little") + header.ljust(size), 0)
        if self._pinned not in (0, self._end):
            self._unpin()  # truncating would take pages from under the driver
        os.ftruncate(self._fd, HEADER_BYTES + self._end)  # pages behind it are given back
        self._written = min(self._written, self._end)
        if self._map is None:
            self.close()
        elif not self._pinned and torch.cuda.is_available():
            # From the next version on, copies from the GPU run at the speed of the bus.
            if pin(self._map.data_ptr(), HEADER_BYTES + self._end):
                self._pinned = self._end

    def _unpin(self) -> None:
        if self._pinned and self._map is not None:
            torch.cuda.cudart().cudaHostUnregister(self._map.data_ptr())
        self._pinned = 0

    def close(self) -> None:
        self._unpin()
        self._map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def pin(address: int, nbytes: int) -> bool:
    """Register memory with the GPU's driver; False where that is not allowed: copies then take the slow way."""
    runtime = torch.cuda.cudart()
    if runtime.cudaHostRegister(address, nbytes, 0) == runtime.cudaError.success:
        return True
    with contextlib.suppress(RuntimeError):  # the runtime reports its last error once more, at the next kernel
        torch.zeros(1, device="cuda")
    return False


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)  # at most 2 GiB at a time
        data, offset = data[written:], offset + written


def in_memory(path: Path) -> bool:
    return MEMORY in path.resolve().parents


def default_parent(need_bytes: int) -> Path:
    """Memory if it has room (containers often get 64 MiB of /dev/shm), else the disk."""
    roomy = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > need_bytes
    return MEMORY if roomy else Path(tempfile.gettempdir())


def private_directory(parent: Path) -> tuple[Path, int]:
    """A new directory (0700) in ``parent``, and a descriptor whose lock keeps it from being removed as abandoned."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent)
    root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # mkdtemp gives mode 0700
    lock_fd = os.open(root / "lock.new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    (root / "lock.new").rename(root / "lock")  # never visible unlocked
    return root, lock_fd


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
            continue  # its owner lives
        finally:
            os.close(fd)
