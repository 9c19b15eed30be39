"""Tensors packed into a few large buckets, for transports that move buckets and not tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

ALIGN_BYTES = 16  # of every tensor in a bucket: a view as a wider type must not start in between
Memory = TypeVar("Memory")


@dataclass(frozen=True)
class Entry:
    """One tensor of a bucket. ``dtype`` as in ``torch.float32`` without the ``torch.``."""

    name: str
    dtype: str
    shape: list[int]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(getattr(torch, self.dtype).itemsize)


def layout(entries: Iterable[Entry]) -> tuple[list[int], int]:
    """Byte offset of each tensor in its bucket, and the bucket's size."""
    offsets, end = [], 0
    for entry in entries:
        offsets.append(end)
        end += -(-entry.nbytes // ALIGN_BYTES) * ALIGN_BYTES
    return offsets, end


def tensors_of(bucket: Tensor, entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Views of the tensors in a bucket. ValueError when it is too small for them."""
    offsets, total = layout(entries)
    if total > len(bucket):
        raise ValueError(f"a bucket of {len(bucket)} bytes cannot hold its {len(entries)} tensors of {total} bytes")
    return {
        entry.name: bucket[offset : offset + entry.nbytes].view(getattr(torch, entry.dtype)).reshape(entry.shape)
        for offset, entry in zip(offsets, entries, strict=True)
    }


class Buckets(Generic[Memory]):
    """One version of the weights, in memory that the next version takes over: new memory costs more than the copy.

    Args:
        nbytes: of a bucket; a larger tensor gets a bucket of its size.
        allocate: makes the memory of a bucket with that many bytes.
        view: of such memory, (nbytes,) uint8.
        wait: whether `put` returns only after its copy. Else the copy is in the order of the current stream, which
            needs memory of the GPU or pinned memory.
    """

    def __init__(
        self, nbytes: int, allocate: Callable[[int], Memory], view: Callable[[Memory], Tensor], *, wait: bool
    ) -> None:
        self._nbytes, self._allocate, self._view, self._wait = nbytes, allocate, view, wait
        self._spare: list[Memory] = []
        self._fill = 0  # bytes in the last bucket; 0: the next tensor opens a new one
        self.memory: list[Memory] = []
        self.entries: list[list[Entry]] = []

    def begin(self) -> None:
        """Empty, for a new version."""
        self._spare, self.memory, self.entries, self._fill = [*self.memory, *self._spare], [], [], 0

    def put(self, name: str, tensor: Tensor) -> Tensor:
        """Append a copy of the tensor, which is returned."""
        entry = Entry(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        if not self._fill or self._fill + entry.nbytes > self._nbytes:
            self.memory.append(self._take(max(self._nbytes, layout([entry])[1])))
            self.entries.append([])
            self._fill = 0
        place = self._view(self.memory[-1])[self._fill : self._fill + entry.nbytes]
        placed = place.view(tensor.dtype).reshape(entry.shape)
        placed.copy_(tensor.detach(), non_blocking=not self._wait)
        self.entries[-1].append(entry)
        self._fill += layout([entry])[1]
        return placed

    def _take(self, nbytes: int) -> Memory:
        """The smallest spare memory that is large enough, or new."""
        sizes = [self._view(memory).numel() for memory in self._spare]
        fits = [index for index, size in enumerate(sizes) if size >= nbytes]
        if fits:
            return self._spare.pop(min(fits, key=lambda index: sizes[index]))
        return self._allocate(nbytes)

    def end(self) -> None:
        """The version is complete: give up memory that it did not need."""
        self._spare = []

    def filled(self) -> list[Tensor]:
        """The used part of every bucket."""
        pairs = zip(self.memory, self.entries, strict=True)
        return [self._view(memory)[: layout(entries)[1]] for memory, entries in pairs]

    def clear(self) -> None:
        """Give up all memory."""
        self._spare, self.memory, self.entries, self._fill = [], [], [], 0
