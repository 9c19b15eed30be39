"""Pieces of tensors in a "torch_dist" checkpoint, read by rows.

Every piece is one tensor as saved by `torch.save`. `torch.load` gives the position of its numbers (onto the "meta"
device, `weights_only=True`, so no code runs and no number is read), and any rows are then read directly from there. So
memory and copies do not grow with the size of the pieces, which in a checkpoint saved by Megatron are whole shards.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.utils import _create_file_view

from conversion.digests import RunningCheck


class PieceReader:
    """Reads rows of stored pieces; safe to share between threads.

    Args:
        promised: by file and by where a piece begins in it, where it ends and its checksum. A piece whose rows are read
            in order, by one thread, is compared with it when the last row has been read.
    """

    def __init__(
        self, directory: Path, metadata: Metadata, promised: Mapping[str, Mapping[int, tuple[int, str]]] | None = None
    ) -> None:
        self._directory = directory
        self._promised = promised or {}
        self._running: dict[MetadataIndex, RunningCheck] = {}
        self.checked: set[tuple[str, int]] = set()  # (file, start) of pieces that were compared
        self._places = metadata.storage_data or {}
        self._data_start: dict[MetadataIndex, int | None] = {}  # bytes from the start of the file; None: ask torch
        self._beginnings: dict[tuple[torch.Size, torch.dtype, int], bytes] = {}  # before the numbers, by kind of piece
        self._last: tuple[MetadataIndex, Tensor] | None = None

    def read(self, key: str, piece: ChunkStorageMetadata, lead: Sequence[int], first: int, target: Tensor) -> None:
        """Fill `target` with rows of a piece.

        Args:
            lead: position on the leading axes, counted within the piece.
            first: row at which to begin, counted within the piece.
            target: (rows, …) of the piece's dtype and trailing extents; any strides.

        Raises:
            ValueError: the piece is missing, damaged or cannot be read; says which.
        """
        index = MetadataIndex(key, piece.offsets)
        try:
            if index not in self._data_start:
                self._data_start[index] = self._locate(index, piece, target.dtype)
            start = self._data_start[index]
            if start is None:
                target.copy_(self._whole(index)[tuple(lead)][first : first + len(target)])
                return
            before = 0
            for position, extent in zip(lead, piece.sizes, strict=False):
                before = before * extent + position
            before = (before * piece.sizes[len(lead)] + first) * math.prod(target.shape[1:]) * target.element_size()
            data = self._fill(index, start + before, target)
            self._follow(index, start, before, data, piece.sizes.numel() * target.element_size())
        except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"a stored piece of {key} is damaged or cannot be read ({error}): copy the checkpoint again"
            ) from error

    def _follow(self, index: MetadataIndex, start: int, before: int, data: memoryview, size: int) -> None:
        """Take the bytes of some rows into the piece's checksum, and compare it after the last of `size` bytes."""
        place = self._places[index]
        end, expected = self._promised.get(place.relative_path, {}).get(place.offset, (0, ""))
        if end < place.offset + place.length or not expected:
            return
        running = self._running.setdefault(index, RunningCheck(expected))
        if before == 0:
            running.restart()
            running.update(self._bytes(place.relative_path, place.offset, start), 0)
        if running.position == before:
            running.update(data, len(data))
        if running.position == size:
            running.update(self._bytes(place.relative_path, start + size, end), 0)
            del self._running[index]
            if not running.holds():
                raise OSError(f"{place.relative_path} does not have the bytes that the manifest promises")
            self.checked.add((place.relative_path, place.offset))

    def _load(self, index: MetadataIndex, device: str) -> Tensor:
        place = self._places[index]
        with (self._directory / place.relative_path).open("rb") as file:
            view = cast(IO[bytes], _create_file_view(file, place.offset, place.length))
            loaded = torch.load(view, map_location=device, weights_only=True)
        if not isinstance(loaded, Tensor):
            raise EOFError("not a tensor")
        return loaded

    def _locate(self, index: MetadataIndex, piece: ChunkStorageMetadata, dtype: torch.dtype) -> int | None:
        place = self._places[index]
        kind = piece.sizes, dtype, place.length
        known = self._beginnings.get(kind)
        # most pieces begin alike: no need to ask again
        if known and self._bytes(place.relative_path, place.offset, place.offset + len(known)) == known:
            return int(place.offset + len(known))
        tensor = self._load(index, "meta")
        if tensor.shape != piece.sizes or tensor.dtype != dtype:
            raise EOFError(f"{tensor.dtype} {tuple(tensor.shape)} instead of {dtype} {tuple(piece.sizes)}")
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)  # older torch does not tell
        if offset is None or not tensor.is_contiguous():
            return None
        if tensor.storage_offset() == 0:
            self._beginnings[kind] = self._bytes(place.relative_path, place.offset, place.offset + offset)
        return int(place.offset + offset + tensor.storage_offset() * tensor.element_size())

    def _bytes(self, file: str, start: int, stop: int) -> bytes:
        with (self._directory / file).open("rb", buffering=0) as opened:
            return os.pread(opened.fileno(), stop - start, start)

    def _whole(self, index: MetadataIndex) -> Tensor:
        last = self._last
        if last is None or last[0] != index:
            self._last = last = index, self._load(index, "cpu")
        return last[1]

    def _fill(self, index: MetadataIndex, offset: int, target: Tensor) -> memoryview:
        rows = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
        view = data = rows.reshape(-1).view(torch.uint8).numpy().data
        with (self._directory / self._places[index].relative_path).open("rb", buffering=0) as file:
            while view:
                count = os.preadv(file.fileno(), [view], offset)
                if count == 0:
                    raise EOFError("the file ends inside it")
                view, offset = view[count:], offset + count
        if rows is not target:
            target.copy_(rows)
        return data
