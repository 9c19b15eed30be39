"""Weight transport by shared memory, between processes of one machine that use the same GPU.

The learner packs a version into buckets on its GPU. A worker asks for them over a unix socket and gets CUDA IPC
handles: it maps the same memory, checks the tensors there and loads them. No byte passes through the host. Without a
GPU the buckets are anonymous files in memory (memfd), and a worker gets their descriptors.

The socket is in a private directory, both sides compare the user of the other one with their own, and messages are
msgpack with fixed fields: nothing that arrives is unpickled. vLLM's own "ipc" engine sends pickles over HTTP.

`python -m megatron_ext.sync.ipc SOCKET CHECKSUM DEVICE` is the other process of `problem`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from megatron_ext.sync.base import WeightDigest, WeightUpdateError, stage_weights
from megatron_ext.sync.buckets import Buckets
from megatron_ext.sync.disk import MEMORY, private_directory

BUCKET_BYTES = 512 << 20
PROBE_S = 120.0  # for another process to start, and to map a few bytes
SOCKET = "socket"
ANSWER_S = 10.0  # for one message
MESSAGE_BYTES = 64 << 20
CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group


class Question(msgspec.Struct):
    """What a worker asks for: the update that it was told of over HTTP."""

    version: int
    checksum: str


class Handle(msgspec.Struct):
    """One bucket on a GPU: the arguments of torch's ``UntypedStorage._new_shared_cuda``, in order, after the device."""

    memory: bytes
    nbytes: int
    offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    wait: bool


class Offer(msgspec.Struct):
    """The answer. ``refusal``: why there is none; ``device``: see `device_name`. Host memory has sizes only."""

    device: str = ""
    handles: list[Handle] = []
    sizes: list[int] = []  # of the files whose descriptors follow, one message each
    refusal: str = ""


@dataclass
class HostMemory:
    """An anonymous file in memory and its mapping, (nbytes,) uint8."""

    nbytes: int

    def __post_init__(self) -> None:
        self.fd = os.memfd_create("megatron-gppo-weights", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.nbytes)
        self.view = torch.frombuffer(mmap.mmap(self.fd, self.nbytes), dtype=torch.uint8)

    def __del__(self) -> None:
        os.close(self.fd)


class IpcSync:
    """`WeightSync` by shared memory. The workers read by themselves, at any time while a version is staged.

    Host memory is overwritten by the next version, as files in memory are (`disk.DiskSync`). On a GPU the next version
    takes other memory if a worker still has the handles of this one, which torch counts.

    Args:
        device: of the buckets; default the current GPU, else the host.
        digest: kind of `WeightDigest`; default "lanes" on a GPU, else "xxh3".
        delta: as in `disk.DiskSync`.
    """

    def __init__(self, device: torch.device | None = None, digest: str | None = None, *, delta: bool = False) -> None:
        on_gpu = torch.cuda.is_available()
        self.device = device or torch.device(f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu")
        self.digest = digest or ("lanes" if self.device.type == "cuda" else "xxh3")
        self._delta = delta
        self._buckets: Buckets[Any]
        if self.device.type == "cuda":
            self._buckets = Buckets(BUCKET_BYTES, self._gpu_memory, lambda memory: memory, wait=False)
        else:
            self._buckets = Buckets(BUCKET_BYTES, HostMemory, lambda memory: memory.view, wait=True)
        self.info: dict[str, Any] | None = None
        self._lock = threading.Lock()  # of what is staged
        self.root, self._lock_fd = private_directory(
            MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        )
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.root / SOCKET))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, name="weights-ipc", daemon=True)
        self._thread.start()

    def _gpu_memory(self, nbytes: int) -> Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise WeightUpdateError(
                "rollout.weight_sync=ipc: the GPU has no room for a copy of the weights beside those of learner and "
                "server; set rollout.weight_sync=disk"
            ) from error

    # ---- staging ------------------------------------------------------------------------------------------------

    def begin(self, version: int) -> None:
        with self._lock:
            self.info = None
            if self.device.type == "cuda":
                self._buckets.clear()
                torch.cuda.ipc_collect()
            else:
                self._buckets.begin()

    def send(self, name: str, tensor: Tensor) -> Tensor:
        """Stage a copy of one tensor, on the GPU if there is one."""
        return self._buckets.put(name, tensor)

    def seal(self, version: int, checksum: str, manifest: Mapping[str, str]) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        with self._lock:
            self._buckets.end()
            buckets = [[asdict(entry) for entry in entries] for entries in self._buckets.entries]
            self.info = {"version": version, "checksum": checksum, "digest": self.digest, "buckets": buckets}
            self.info |= {"socket": str(self.root / SOCKET), "tensors": dict(manifest), "delta": self._delta}

    def discard(self) -> None:
        with self._lock:
            self.info = None
            self._buckets.clear()
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()  # memory that workers have let go of
            torch.cuda.empty_cache()

    def free(self) -> None:
        """On a GPU nothing stays staged: the servers need the memory. One that returns waits for the next update."""
        if self.device.type == "cuda":
            self.discard()

    # ---- delivery -----------------------------------------------------------------------------------------------

    def connect(self, urls: Sequence[str], workers: Sequence[int], timeout_s: float) -> list[dict[str, Any]]:
        """A worker connects when it is told of an update."""
        return []

    def join(self) -> None:
        """Nobody to wait for."""

    def feed(self) -> None:
        """The workers read by themselves."""

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            with connection:
                try:
                    connection.settimeout(ANSWER_S)
                    check_user(connection)
                    self._answer(connection)
                except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
                    print(f"weights by ipc: a worker got no answer: {error}", file=sys.stderr, flush=True)

    def _answer(self, connection: socket.socket) -> None:
        question = msgspec.msgpack.decode(receive_message(connection), type=Question)
        with self._lock:
            staged = Question(self.info["version"], self.info["checksum"]) if self.info else None
            if question != staged:
                have = f"version {staged.version}" if staged else "nothing"
                send_message(connection, Offer(refusal=f"the learner has {have} to offer; send the update again"))
                return
            memory = self._buckets.memory
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    # Exported anew for each worker: torch counts one release per export.
                    handles = [Handle(*bucket.untyped_storage()._share_cuda_()[1:]) for bucket in memory]
                send_message(connection, Offer(device_name(self.device), handles))
                return
            send_message(connection, Offer(device_name(self.device), sizes=[bucket.nbytes for bucket in memory]))
            for bucket in memory:
                socket.send_fds(connection, [b"\0"], [bucket.fd])

    def close(self) -> None:
        """Stop serving; remove the private directory. Safe to call twice."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._listener.close()
        self._thread.join(2 * ANSWER_S)
        self.discard()
        shutil.rmtree(self.root, ignore_errors=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def fetch(path: str, version: int, checksum: str, device: torch.device) -> list[Tensor]:
    """The buckets of an update, (nbytes,) uint8 each, mapped and not copied. They live as long as the result.

    Raises ValueError when the learner has another version, or the memory is on another device than ``device``; OSError
    when there is no answer, or the socket or its owner is not this user's.
    """
    about = Path(path).parent.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise PermissionError(f"{Path(path).parent} is not a private directory of this user")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_S)
        connection.connect(path)
        check_user(connection)
        send_message(connection, Question(version, checksum))
        offer = msgspec.msgpack.decode(receive_message(connection), type=Offer)
        if offer.refusal:
            raise ValueError(offer.refusal)
        if offer.device != device_name(device):
            raise ValueError(
                f"the weights are on {offer.device}, this worker on {device_name(device)}: rollout.weight_sync=ipc "
                "needs the same GPU, set it to disk"
            )
        if device.type == "cuda":
            return [_open(handle, device) for handle in offer.handles]
        return [_map(connection, nbytes) for nbytes in offer.sizes]


def _open(handle: Handle, device: torch.device) -> Tensor:
    torch.cuda.init()
    storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *msgspec.structs.astuple(handle))
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _map(connection: socket.socket, nbytes: int) -> Tensor:
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if len(descriptors) != 1:
        raise ConnectionError("the learner ended the connection before all descriptors had arrived")
    try:
        # Private: a write to it by mistake would not reach the learner.
        return torch.frombuffer(mmap.mmap(descriptors[0], nbytes, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    finally:
        os.close(descriptors[0])


def device_name(device: torch.device) -> str:
    """The same for the same GPU in every process, whatever GPUs that sees."""
    if device.type != "cuda":
        return "the host"
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def check_user(connection: socket.socket) -> None:
    """PermissionError unless the process at the other end belongs to this user."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    process, user, _ = CREDENTIALS.unpack(packed)
    if user != os.getuid():
        raise PermissionError(f"process {process} belongs to user {user}, not to {os.getuid()}")


def send_message(connection: socket.socket, message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    connection.sendall(len(data).to_bytes(4, "little") + data)


def receive_message(connection: socket.socket) -> bytes:
    """One message. OSError when it is cut off or larger than any of ours."""
    size = int.from_bytes(_exactly(connection, 4), "little")
    if size > MESSAGE_BYTES:
        raise ConnectionError(f"a message of {size} bytes, larger than any of this protocol")
    return _exactly(connection, size)


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("the other side ended the connection within a message")
        data += part
    return bytes(data)


def problem(device: torch.device | None = None) -> str | None:
    """Why another process cannot map memory of ``device`` here, found by trying; None if it can.

    Some containers and virtual machines have no CUDA IPC. Takes the start of a process: some seconds.
    """
    sync = IpcSync(device)
    try:
        checksum = stage_weights(sync, 0, {PROBE: torch.arange(64, device=sync.device)}.items())
        words = [str(sync.root / SOCKET), checksum, str(sync.device)]
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        tried = subprocess.run(
            [sys.executable, "-P", "-m", "megatron_ext.sync.ipc", *words],
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            check=False,
            env=os.environ | {"PYTHONPATH": path},
        )
        return None if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # torch's errors are RuntimeErrors
        return f"{type(error).__name__}: {error}"
    finally:
        sync.close()


PROBE = "probe"


def main(path: str, checksum: str, name: str) -> None:
    device = torch.device(name)
    (bucket,) = fetch(path, 0, checksum, device)
    digest = WeightDigest("lanes" if device.type == "cuda" else "xxh3")
    digest.add(PROBE, bucket[:512].view(torch.int64))
    if digest.hexdigest() != checksum:
        sys.exit("the memory that was mapped holds other bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
