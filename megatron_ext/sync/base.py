"""The interface of a weight update, the same for every transport, and its checksum.

A transport *stages* one version at a time (`stage_weights`) and then delivers it to any set of servers, any number of
times: to all of them at an update, or to one that returned. `recipes.rollout.vllm.update` drives the servers. A server
that has not confirmed version and checksum gets no requests.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

DIGESTS = ("xxh3", "sha256", "lanes")
DIGEST_CHUNK_BYTES = 8 << 20  # part of the digest's definition
LANE_WORDS = 16384  # of 32 bits in a row of "lanes", part of its definition
LANE_PIECE_ROWS = 512  # rows at a time, 32 MiB: bounds the memory that "lanes" takes


class WeightUpdateError(RuntimeError):
    """An update was refused, incomplete, or not confirmed in time."""


class WeightSync(Protocol):
    """Stages one version of the weights and delivers it to servers."""

    digest: str  # kind of `WeightDigest`

    def begin(self, version: int) -> None: ...  # drops what was staged before

    def send(self, name: str, tensor: Tensor) -> Tensor:
        """Keep a copy: the caller may reuse its buffer. Returns the copy, which a stream may still write."""

    def seal(self, version: int, checksum: str, manifest: Mapping[str, str]) -> None: ...  # complete: sets `info`
    def discard(self) -> None: ...  # nothing is staged afterwards

    @property
    def info(self) -> dict[str, Any] | None:
        """Body of every server's ``/update_weights``; None while nothing is sealed."""

    def connect(self, urls: Sequence[str], workers: Sequence[int], timeout_s: float) -> list[dict[str, Any]]:
        """Bodies of ``/init_weight_transfer_engine``, one per server with that many workers; [] if none is needed."""

    def join(self) -> None: ...  # the learner's side of that, while the servers join; OSError

    def feed(self) -> None: ...  # the learner's side of the transfer, while the servers receive; OSError

    def free(self) -> None: ...  # give up memory of the GPU, if the staged version takes any
    def close(self) -> None: ...


@cache
def _host_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), thread_name_prefix="weights")


class Ranks(Protocol):
    """The other ranks of the learner, which stage a part of every version themselves."""

    def begin(self, sync: Any) -> None: ...
    def collect(self) -> list[dict[str, str]]: ...  # manifests, once this rank has staged its part; WeightUpdateError


def copy_by_threads(to: Tensor, source: Tensor) -> None:
    """Copy bytes on the host, both (nbytes,) uint8, by as many threads as hash them: one reaches 10 GB/s."""
    pieces = zip(to.split(DIGEST_CHUNK_BYTES), source.split(DIGEST_CHUNK_BYTES), strict=True)
    list(_host_threads().map(lambda pair: pair[0].copy_(pair[1]), pieces))


def take_pages(memory: Tensor) -> None:
    """Make the kernel provide the pages of new memory, (nbytes,) uint8, by several threads: one alone gets 1 GB/s."""
    list(_host_threads().map(lambda part: part[:: mmap.PAGESIZE].zero_(), memory.split(DIGEST_CHUNK_BYTES)))


class WeightDigest:
    """A digest over names, dtypes, shapes and bytes of a set of tensors, independent of their order.

    Args:
        kind: how the bytes of a tensor are hashed.
            "xxh3": XXH3 with 128 bits, on the host: 19 GB/s on one core where measured. Finds damage, not intent.
            "sha256": 1 GB/s on the same core. Also finds intent.
            "lanes": two 64-bit multilinear hashes of every 64 KiB, computed where the tensor is: for tensors on a GPU,
            whose bytes then do not visit the host. Very slow on a CPU.

    On the host a tensor is hashed in chunks of 8 MiB by up to 8 threads, and the chunks' digests are hashed again.
    """

    def __init__(self, kind: str = "xxh3") -> None:
        assert kind in DIGESTS
        self._kind = kind
        self._parts: dict[str, tuple[str, bytes | Tensor]] = {}  # digests of the chunks, or the lanes on the device

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for a name seen before."""
        if name in self._parts:
            raise ValueError(f"weight {name!r} occurs twice in one update: every name is sent once")
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        found = lanes(flat) if self._kind == "lanes" else self._chunks(flat.cpu())
        self._parts[name] = (f"{tensor.dtype} {tuple(tensor.shape)} ", found)

    def _chunks(self, flat: Tensor) -> bytes:
        data = flat.numpy().data
        chunks = [data[start : start + DIGEST_CHUNK_BYTES] for start in range(0, len(data), DIGEST_CHUNK_BYTES)]
        one = _sha256 if self._kind == "sha256" else xxhash.xxh3_128_digest
        return b"".join(map(one, chunks) if len(chunks) < 2 else _host_threads().map(one, chunks))

    def manifest(self) -> dict[str, str]:
        """Of each tensor dtype, shape and a digest of its bytes: equal entries are equal tensors."""
        on_device = [parts for _, parts in self._parts.values() if isinstance(parts, Tensor)]
        # Their rows come in one copy: each copy waits for the GPU.
        rows = torch.cat(on_device).cpu() if on_device else torch.empty(0, 2, dtype=torch.int64)
        found, start = {}, 0
        for name, (head, parts) in self._parts.items():
            if isinstance(parts, Tensor):
                data = rows[start : start + len(parts)].numpy().tobytes()
                start += len(parts)
            else:
                data = parts
            found[name] = head + hashlib.sha256(data).hexdigest()
        return found

    def hexdigest(self) -> str:
        return checksum_of(self._kind, self.manifest())


def checksum_of(kind: str, manifest: Mapping[str, str]) -> str:
    """The digest of a set of tensors, from `WeightDigest.manifest`."""
    lines = [kind, *(f"{name} {entry}" for name, entry in sorted(manifest.items()))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sha256(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()  # releases the interpreter lock


def lanes(flat: Tensor) -> Tensor:
    """(rows, 2) int64 on the device of ``flat`` (uint8, one dimension): two hashes of every 64 KiB.

    Multilinear modulo 2^64: the sum of 32-bit words times random odd 64-bit constants. Two different rows have equal
    hashes in one lane with probability 2^-33 or less over the constants, in both with 2^-66. The last row is filled up
    with zeros; the length is part of the digest.
    """
    weights = _lane_weights(flat.device)
    row_bytes = 4 * LANE_WORDS
    found = []
    fused = _fused_lanes(flat.device) if len(flat) and not (len(flat) % 4 or flat.data_ptr() % 4) else None
    if fused is not None:
        return fused(flat.view(torch.int32), weights)
    for start in range(0, len(flat), LANE_PIECE_ROWS * row_bytes):
        piece = flat[start : start + LANE_PIECE_ROWS * row_bytes]
        if len(piece) % row_bytes or piece.data_ptr() % 4:
            padded = piece.new_zeros(-(-len(piece) // row_bytes) * row_bytes)
            padded[: len(piece)] = piece
            piece = padded
        found.append(_lanes_of(piece.view(torch.int32).view(-1, LANE_WORDS), weights))
    return torch.cat(found) if found else torch.empty(0, 2, dtype=torch.int64, device=flat.device)


def _lanes_of(words: Tensor, weights: Tensor) -> Tensor:
    return torch.stack([(words * weight).sum(1) for weight in weights], dim=1)


@cache
def _lane_weights(device: torch.device) -> Tensor:
    """(2, LANE_WORDS) odd constants, the same in every process: the first outputs of Philox with key 0."""
    words = np.random.Philox(key=0).random_raw(2 * LANE_WORDS) | np.uint64(1)
    return torch.from_numpy(words.view(np.int64).copy()).view(2, LANE_WORDS).to(device)


@cache
def _fused_lanes(device: torch.device) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The same as one kernel, on a GPU where Triton works, found by trying: it must give the same numbers."""
    if device.type != "cuda":
        return None
    try:
        from megatron_ext.sync.triton_lanes import lanes as fused

        words = torch.arange(5 * LANE_WORDS, dtype=torch.int32, device=device) * -77_777_777
        words[4 * LANE_WORDS + 7 :] = 0
        expected = _lanes_of(words.view(5, LANE_WORDS), _lane_weights(device))
        if torch.equal(fused(words[: 4 * LANE_WORDS + 7], _lane_weights(device)), expected):
            return fused
        why = "its results differ"
    except Exception as error:  # no compiler, an unknown GPU, another Triton: its errors have many classes
        why = f"{type(error).__name__}: {error}"
    print(f"weight updates: the digest takes torch's slower operations, since Triton does not work here ({why})")
    return None


def stage_weights(
    sync: WeightSync,
    version: int,
    tensors: Iterable[tuple[str, Tensor]],
    seconds: dict[str, float] | None = None,
    ranks: Ranks | None = None,
) -> str:
    """Stage one whole version and return its checksum. Whatever ``tensors`` raises leaves nothing staged.

    ``seconds`` gets the time of "export" (waiting for ``tensors``), "stage" (the copy), "digest", and "ranks": waiting
    for the other ``ranks``, which stage the tensors that this one does not have.
    """
    digest = WeightDigest(sync.digest)
    clock = Clock({} if seconds is None else seconds)
    try:
        sync.begin(version)
        if ranks is not None:
            ranks.begin(sync)
        for name, tensor in tensors:
            clock.lap("export")
            placed = sync.send(name, tensor)
            clock.lap("stage")
            # Hash the source where that costs no second copy: a hash of the copy would not detect a damaged copy.
            source = tensor if tensor.is_cuda == (sync.digest == "lanes") else placed
            if tensor.is_cuda and not source.is_cuda:
                torch.cuda.current_stream().synchronize()  # the copy into pinned memory may still run
            digest.add(name, source)
            clock.lap("digest")
        manifest = digest.manifest()
        if ranks is not None:
            clock.lap("digest")
            for part in ranks.collect():
                if twice := sorted(manifest.keys() & part.keys()):
                    raise ValueError(f"weight {twice[0]!r} occurs twice in one update: every name is sent once")
                manifest |= part
            clock.lap("ranks")
        checksum = checksum_of(sync.digest, manifest)
        clock.lap("digest")
        sync.seal(version, checksum, manifest)
        clock.lap("stage")
    except BaseException:
        sync.discard()
        raise
    return checksum


class Clock:
    """Adds the time since the last call to a named entry of ``seconds``."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now
