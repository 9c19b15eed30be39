"""Weight transport through a collective: the learner's rank 0 broadcasts packed buckets to the workers of all servers.

The same code runs with NCCL between GPUs and with gloo over TCP; vLLM's control routes tell the workers when to take
part. The group is made of torch's process-group classes directly: the learner belongs to Megatron's default group
already, and `torch.distributed.init_process_group` allows one per process.

The staged version stays in host memory, one copy: a broadcast that breaks off can be repeated to the servers that are
left, and the checksum needs the bytes on the host anyway.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.sync.buckets import Buckets

BACKENDS = ("nccl", "gloo")
# Over TCP. malloc hands freed memory out again below 32 MiB; from there on every bucket gets fresh pages from the
# kernel, which cost the receiver twice the CPU time of the transfer itself.
BUCKET_BYTES = 16 << 20
NCCL_BUCKET_BYTES = 256 << 20
Group = Any  # dist.ProcessGroupGloo or dist.ProcessGroupNCCL, whose stubs lack half of what is used here


@dataclass
class Rendezvous:
    """What a worker needs to join: the learner is rank 0, this server's workers are ``rank``, ``rank + 1``, ..."""

    backend: str
    host: str
    port: int
    group: str
    rank: int
    world_size: int
    timeout_s: float  # for joining, and for each bucket


class BroadcastSync:
    """`WeightSync` by broadcast.

    Args:
        backend: "nccl" (learner and servers on GPUs) or "gloo" (any device, over TCP).
        device: of the buckets on the wire; default the current GPU for NCCL, else the host's memory.
        digest: kind of `WeightDigest`; default "lanes" for NCCL (both sides hash on their GPU), else "xxh3".
    """

    def __init__(self, backend: str, device: torch.device | None = None, digest: str | None = None) -> None:
        assert backend in BACKENDS
        self._backend = backend
        self.digest = digest or ("lanes" if backend == "nccl" else "xxh3")
        on_gpu = backend == "nccl" and torch.cuda.is_available()
        self._device = device or torch.device(f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu")
        self._store: dist.TCPStore | None = None
        self._group: Group | None = None
        self._rendezvous: Rendezvous | None = None
        pinned = self._device.type == "cuda"
        self._buckets: Buckets[Tensor] = Buckets(
            NCCL_BUCKET_BYTES if backend == "nccl" else BUCKET_BYTES,
            lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned),
            lambda bucket: bucket,
            wait=not pinned,
        )
        self.info: dict[str, Any] | None = None

    # ---- staging ------------------------------------------------------------------------------------------------

    def begin(self, version: int) -> None:
        self.info = None
        self._buckets.begin()

    def send(self, name: str, tensor: Tensor) -> Tensor:
        """Stage a copy of one tensor on the host."""
        return self._buckets.put(name, tensor)

    def seal(self, version: int, checksum: str, manifest: Mapping[str, str]) -> None:
        self._buckets.end()
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        buckets = [[asdict(entry) for entry in entries] for entries in self._buckets.entries]
        self.info = {"version": version, "checksum": checksum, "digest": self.digest, "buckets": buckets}

    def discard(self) -> None:
        self.info = None
        self._buckets.clear()

    # ---- delivery -----------------------------------------------------------------------------------------------

    def connect(self, urls: Sequence[str], workers: Sequence[int], timeout_s: float) -> list[dict[str, Any]]:
        """A new group of the learner and ``workers[i]`` workers of server i; `join` completes it."""
        self.disconnect()
        if self._store is None:
            self._store = open_store(local_address(urls))
        name, size = secrets.token_hex(8), 1 + sum(workers)
        common: dict[str, Any] = {"backend": self._backend, "host": self._store.host, "port": self._store.port}
        common |= {"group": name, "world_size": size, "timeout_s": timeout_s}
        self._rendezvous = Rendezvous(**common, rank=0)
        return [common | {"rank": 1 + sum(workers[:index])} for index in range(len(workers))]

    def join(self) -> None:
        """Blocks until all are there, as far as the backend knows before the first broadcast. OSError if not."""
        assert self._rendezvous is not None and self._store is not None, "join() before connect()"
        self._group = join_group(self._rendezvous, self._rendezvous.rank, self._store)

    def feed(self) -> None:
        """Broadcast the staged version. OSError, with the group left, when the servers do not take it in in time."""
        if problem := self._feed():
            # Only now: the connections close with the last reference, one of which a traceback would hold, and the
            # others learn from their closing that nothing more will come.
            self.disconnect()
            raise OSError(problem)

    def _feed(self) -> str:
        assert self._group is not None and self._rendezvous is not None and self.info is not None
        filled = self._buckets.filled()
        try:
            ahead: list[Tensor] = []

            def copy(index: int) -> None:
                if index < len(filled):
                    ahead.append(filled[index].to(self._device, non_blocking=True))

            copy(0)
            for index in range(len(filled)):
                # From pinned memory the next bucket goes to the GPU while this one is sent.
                broadcast(self._group, ahead.pop(), self._rendezvous.timeout_s, partial(copy, index + 1))
        except OSError as error:
            return str(error)
        return ""

    def disconnect(self) -> None:
        """Leave the group, so that nobody in it waits for us."""
        if self._group is not None:
            self._group.abort()
            self._group = None

    def free(self) -> None:
        """The staged version is in host memory."""

    def close(self) -> None:
        self.disconnect()
        self.discard()
        self._store = None


def open_store(host: str) -> dist.TCPStore:
    """The rendezvous store, listening on one address only and on a free port."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        timeout = timedelta(seconds=60)
        return dist.TCPStore(
            host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def join_group(rendezvous: Rendezvous, rank: int, store: dist.TCPStore | None = None) -> Group:
    """Become ``rank`` of the group. OSError when the others do not come in time."""
    timeout = timedelta(seconds=rendezvous.timeout_s)
    try:
        if store is None:
            store = dist.TCPStore(rendezvous.host, rendezvous.port, None, False, timeout)
        keys = dist.PrefixStore(rendezvous.group, store)
        if rendezvous.backend == "nccl":
            return _nccl_group(keys, rank, rendezvous.world_size, timeout)
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timeout
        address = local_address([f"tcp://{rendezvous.host}:{rendezvous.port}"])
        options._devices = [gloo.create_device(hostname=address)]
        return gloo(keys, rank, rendezvous.world_size, options)
    except RuntimeError as error:  # torch's DistError and gloo's own
        raise OSError(f"weight broadcast: rank {rank} could not join the group: {error}") from error


def _nccl_group(keys: dist.Store, rank: int, size: int, timeout: timedelta) -> Group:
    """torch's default for a failed collective is to end the process; here it must end the update only."""
    variable = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(variable)
    os.environ[variable] = "0"  # read by the constructor: this group only
    try:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(keys, rank, size, options)
    finally:
        os.environ.pop(variable) if before is None else os.environ.update({variable: before})


def broadcast(group: Group, data: Tensor, timeout_s: float, meanwhile: Callable[[], None] | None = None) -> None:
    """From rank 0 to all, in place; returns when done here. OSError when that takes too long or a peer is gone.

    ``meanwhile`` is called once the transfer has begun.
    """
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    deadline = time.monotonic() + timeout_s
    try:
        if isinstance(group, dist.ProcessGroupGloo):  # it returns at once, and its wait ends in time
            gloo: Any = group
            work = gloo.broadcast([data], options)
            if meanwhile is not None:
                meanwhile()
            work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
            return
        # NCCL connects at the first collective, and waits for lost peers without a limit.
        work = within(timeout_s, lambda: group.broadcast([data], options), group.abort)
        if meanwhile is not None:
            meanwhile()
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise OSError(f"weight broadcast: not all servers took part within {timeout_s:.0f} s")
            time.sleep(0.0005)
        work.wait()
    except RuntimeError as error:
        raise OSError(f"weight broadcast: {error}") from error


def within(timeout_s: float, call: Callable[[], Any], give_up: Callable[[], None]) -> Any:
    """The result of ``call``, or OSError when it takes longer; it is then left to itself, after ``give_up``."""
    done: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="weight-broadcast", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failed:
        raise failed[0]
    if not done:
        give_up()
        raise OSError(f"weight broadcast: not all servers took part within {timeout_s:.0f} s")
    return done[0]


def local_address(urls: Sequence[str]) -> str:
    """This host's address on the way to the first of ``urls`` that is not on this host; loopback if all are."""
    found = "127.0.0.1"
    for url in urls:
        parts = urlsplit(url)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect((parts.hostname, parts.port or 80))
            found = probe.getsockname()[0]
        if not found.startswith("127."):
            return found
    return found
