"""The contract of a weight update, the same for every transport, and the checksum that seals it.

A transport *stages* one version at a time (`stage_weights`) and then delivers it to any set of servers, any number of
times: to all of them at an update, to a single one that came back. `recipes.rollout.vllm.update` drives the servers.
A server that did not confirm version and checksum serves nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

DIGEST_CHUNK_BYTES = 8 << 20  # part of the digest's definition


class WeightUpdateError(RuntimeError):
    """An update was refused, incomplete, or not confirmed in time."""


class WeightSync(Protocol):
    """Where one version of the weights is staged, and how servers get at it."""

    def begin(self, version: int) -> None: ...  # drops what was staged before
    def send(self, name: str, tensor: Tensor) -> None: ...  # keeps a copy: the caller may reuse its buffer
    def seal(self, version: int, checksum: str) -> None: ...  # complete: `info` describes it from here on
    def discard(self) -> None: ...  # nothing is staged afterwards

    @property
    def info(self) -> dict[str, Any] | None:
        """Body of every server's ``/update_weights``; None while nothing is sealed."""

    def connect(self, urls: Sequence[str], workers: Sequence[int], timeout_s: float) -> list[dict[str, Any]]:
        """Bodies of ``/init_weight_transfer_engine``, one per server with that many workers; [] if none is needed."""

    def join(self) -> None: ...  # the learner's side of that, while the servers join; OSError

    def feed(self) -> None: ...  # the learner's side of the transfer, while the servers receive; OSError

    def close(self) -> None: ...


@cache
def _hash_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), thread_name_prefix="digest")


class WeightDigest:
    """SHA-256 over names, dtypes, shapes and bytes of a set of tensors, whatever their order.

    A tensor's bytes are hashed in chunks of 8 MiB by up to 8 threads (1.4 GB/s each where measured), and the chunks'
    digests are hashed again: 15 GB of a 7B model would take ten seconds in one thread.
    """

    def __init__(self) -> None:
        self._parts: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for a name seen before."""
        if name in self._parts:
            raise ValueError(f"weight {name!r} occurs twice in one update: every name is sent once")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        chunks = [data[start : start + DIGEST_CHUNK_BYTES] for start in range(0, len(data), DIGEST_CHUNK_BYTES)]
        digests = map(_sha256, chunks) if len(chunks) < 2 else _hash_threads().map(_sha256, chunks)
        head = f"{tensor.dtype} {tuple(tensor.shape)} "
        self._parts[name] = head + hashlib.sha256(b"".join(digests)).hexdigest()

    def hexdigest(self) -> str:
        lines = "\n".join(f"{name} {part}" for name, part in sorted(self._parts.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()  # releases the interpreter lock


def stage_weights(sync: WeightSync, version: int, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Stage one whole version and return its checksum. Whatever ``tensors`` raises leaves nothing staged."""
    digest = WeightDigest()
    try:
        sync.begin(version)
        for name, tensor in tensors:
            digest.add(name, tensor)
            sync.send(name, tensor)
        checksum = digest.hexdigest()
        sync.seal(version, checksum)
    except BaseException:
        sync.discard()
        raise
    return checksum
