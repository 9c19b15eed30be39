"""Megatron `dist_checkpointing` directories ("torch_dist" format), written block by block without Megatron.

The format is torch's distributed checkpoint with keys of Megatron's choosing, a `metadata.json` that names it and a
`common.pt` for what is not a tensor. Large tensors are stored as several pieces of whole rows, which Megatron reads
into any parallel layout. A piece is byte for byte what `torch.save` would write, but its numbers are streamed: they are
read, rearranged, hashed and written while they are in the processor's cache, and never all in memory.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from conversion.adapter import MergedReader
from conversion.config import HFConfig
from conversion.digests import bulk_digest, text
from conversion.hf_files import PIECE_BYTES, WRITEBACK_BYTES, HFReader, start_writeback
from conversion.mapping import hf_parts, import_rows, megatron_names, megatron_shape, row_unit
from conversion.megatron_args import megatron_lm_arguments
from conversion.megatron_keys import extra_state_keys, own_slots
from conversion.parallel import for_each, share
from conversion.pickled import PickledReader
from conversion.values import Values

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
FORMAT |= {"common_backend": "torch", "common_backend_version": 1}
STORED_BYTES = 16 << 20  # of a piece: what a reader who wants any of it must find and check
BLOCK_BYTES = 1 << 22  # in memory at a time, a few per thread
Reader = HFReader | PickledReader | MergedReader
Progress = Callable[[int], object]  # called with a number of bytes done, from any thread


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows [start, stop) of one Megatron tensor, to be stored under `index` as a tensor of shape `sizes`."""

    index: MetadataIndex
    name: str
    start: int
    stop: int
    sizes: torch.Size
    dtype: torch.dtype


def _row_ranges(hf: HFConfig, name: str, itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most STORED_BYTES (or one unit) that cover a Megatron tensor.

    Where parts are stacked, a range ends with its part: it is then read straight from one Hugging Face tensor.
    """
    rows, *rest = megatron_shape(hf, name)
    unit = row_unit(hf, name)
    step = _step(STORED_BYTES, unit, itemsize * math.prod(rest))
    parts = [shape[0] for shape in hf_parts(hf, name).values()] if unit == 1 else [rows]
    for stop, count in zip(itertools.accumulate(parts), parts, strict=True):
        yield from ((start, min(start + step, stop)) for start in range(stop - count, stop, step))


def _step(size: int, unit: int, row_bytes: int) -> int:
    return max(size // (row_bytes * unit), 1) * unit


def _plan(hf: HFConfig, reader: Reader, dtype: torch.dtype | None) -> tuple[list[_Piece], Metadata]:
    """All pieces in the order of a forward pass, and the checkpoint's index but for where the pieces will lie."""
    pieces: list[_Piece] = []
    tensors: dict[str, TensorStorageMetadata] = {}
    for name in megatron_names(hf):
        shape = megatron_shape(hf, name)
        for slot in own_slots(hf, name):
            found = {reader.tensors[part].dtype for part in hf_parts(hf, name)}
            properties = TensorProperties(dtype=dtype or next(iter(found)))
            whole = TensorStorageMetadata(properties, torch.Size((*slot.extents, *shape)), [])
            entry = tensors.setdefault(slot.key, whole)
            one = entry.properties.dtype
            if dtype is None and found != {one}:
                mixed = ", ".join(sorted(map(str, found | {one})))
                raise ValueError(f"{slot.key} would mix {mixed}: choose one with --dtype")
            for start, stop in _row_ranges(hf, name, one.itemsize):
                offsets = torch.Size((*slot.lead, start, *(0 for _ in shape[1:])))
                sizes = torch.Size((*(1 for _ in slot.lead), stop - start, *shape[1:]))
                entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
                pieces.append(_Piece(MetadataIndex(slot.key, offsets), name, start, stop, sizes, one))
    states = {key: BytesStorageMetadata() for key in extra_state_keys(hf)}
    return pieces, Metadata({**tensors, **states})


@cache
def _frame(sizes: torch.Size, dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and after the numbers of a tensor; it depends on nothing else of it.

    CRCs are switched off (they would depend on the numbers): the manifest has a checksum of every file.
    """
    buffer = io.BytesIO()
    previous = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.zeros(sizes, dtype=dtype), buffer)
    finally:
        torch.serialization.set_crc32_options(previous)
    buffer.seek(0)
    start = torch._C.PyTorchFileReader(buffer).get_record_offset("data/0")  # type: ignore[attr-defined]
    data = buffer.getbuffer()
    return bytes(data[:start]), bytes(data[start + sizes.numel() * dtype.itemsize :])


class _File:
    """A file that is hashed in segments while it is written."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._digests = {0: bulk_digest()}  # by where the segment begins
        self.size = self._flushed = 0

    def begin_segment(self) -> int:
        """What is written from here on has a checksum of its own; returns where that is."""
        self._digests[self.size] = bulk_digest()
        return self.size

    def segments(self) -> dict[int, str]:
        return {start: text(digest) for start, digest in self._digests.items()}

    def write(self, data: bytes | memoryview) -> None:
        view, digest = memoryview(data), next(reversed(self._digests.values()))
        while view:
            written = os.write(self._fd, view[:PIECE_BYTES])
            digest.update(view[:written])
            self.size += written
            view = view[written:]
        if self.size - self._flushed >= WRITEBACK_BYTES:
            start_writeback(self._fd, self._flushed, self.size - self._flushed)
            self._flushed = self.size

    def close(self) -> None:
        os.close(self._fd)


class _IndexWriter(dcp.FileSystemWriter):
    """Writes `.metadata` without the path of this machine's directory in it."""

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta()


_FIRST = "__0_0.distcp"


class _Importer:
    """Writes pieces into one file per thread."""

    def __init__(self, hf: HFConfig, reader: Reader, out: Path, values: Values, progress: Progress) -> None:
        self._hf, self._reader, self._out, self._values, self._progress = hf, reader, out, values, progress
        self._stop = threading.Event()
        self.results: list[WriteResult] = []
        self.segments: dict[str, dict[int, str]] = {}

    def write(self, shares: list[list[_Piece]], rank: int) -> None:
        """A thread and a file for each share; the first error of any thread stops the others."""
        files = [f"__{rank}_{number}.distcp" for number in range(len(shares))]
        try:
            for_each(self._write_file, zip(files, shares, strict=True), len(shares))
        except BaseException:
            self._stop.set()
            raise

    def _write_file(self, named: tuple[str, list[_Piece]]) -> None:
        name, pieces = named
        file, results = _File(self._out / name), []
        try:
            extra = self._extra_states(file, name) if name == _FIRST else []
            for piece in pieces:
                if self._stop.is_set():
                    break
                start = file.begin_segment()
                before, after = _frame(piece.sizes, piece.dtype)
                file.write(before)
                for block in self._blocks(piece):
                    file.write(block.reshape(-1).view(torch.uint8).numpy().data)
                file.write(after)
                results.append(_result(piece.index, name, start, file.size))
        except BaseException:
            self._stop.set()
            raise
        finally:
            file.close()
        self.segments[name] = file.segments()
        self.results += extra + results

    def _blocks(self, piece: _Piece) -> Iterator[Tensor]:
        row_bytes = piece.dtype.itemsize * (piece.sizes.numel() // (piece.stop - piece.start))
        step = _step(BLOCK_BYTES, row_unit(self._hf, piece.name), row_bytes)

        def rows(name: str, low: int, high: int) -> Tensor:
            return self._values.cast(name, self._reader.rows(name, low, high), piece.dtype)

        for start in range(piece.start, piece.stop, step):
            stop = min(start + step, piece.stop)
            block = import_rows(self._hf, piece.name, start, stop, rows)
            yield block
            self._progress(block.nbytes)

    def _extra_states(self, file: _File, name: str) -> list[WriteResult]:
        nothing = io.BytesIO()
        torch.save([None], nothing)
        results = []
        for key in extra_state_keys(self._hf):
            start = file.size
            file.write(nothing.getbuffer())
            results.append(_result(MetadataIndex(key), name, start, file.size))
        return results


def _result(index: MetadataIndex, file: str, start: int, end: int) -> WriteResult:
    return WriteResult(index, end - start, _StorageInfo(file, start, end - start))


def _share(pieces: list[_Piece], count: int) -> list[list[_Piece]]:
    """Divide the pieces into lists, each tensor whole: its source is then read in order and can be checked."""
    tensors = [list(group) for _, group in itertools.groupby(pieces, key=lambda piece: piece.name)]
    sizes = [sum(piece.sizes.numel() * piece.dtype.itemsize for piece in tensor) for tensor in tensors]
    return [[piece for tensor in part for piece in tensor] for part in share(tensors, sizes, count)]


@dataclass
class Written:
    """What one process has written, as JSON can carry it."""

    places: list[tuple[str, list[int] | None, str, int, int]]  # key, offsets, file, where it begins, its length
    segments: dict[str, dict[int, str]]  # checksums by file and by where a stretch begins
    names: list[str]  # Megatron parameters

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Written:
        segments = {file: {int(at): text for at, text in found.items()} for file, found in content["segments"].items()}
        return cls([tuple(place) for place in content["places"]], segments, content["names"])


def write_share(
    hf: HFConfig,
    reader: Reader,
    out: Path,
    *,
    dtype: torch.dtype | None,
    threads: int,
    values: Values,
    progress: Progress,
    rank: int = 0,
    world: int = 1,
) -> Written:
    """Write one rank's tensors of a Hugging Face checkpoint into a directory, a file per thread.

    The vocabulary is stored without padding, so any tensor-parallel size can load it.
    """
    pieces, _ = _plan(hf, reader, dtype)
    mine = _share(_share(pieces, world)[rank], threads)
    importer = _Importer(hf, reader, out, values, progress)
    importer.write(mine, rank)
    places = [
        (r.index.fqn, None if r.index.offset is None else list(r.index.offset), s.relative_path, s.offset, s.length)
        for r in importer.results
        for s in [r.storage_data]
    ]
    names = list(dict.fromkeys(piece.name for part in mine for piece in part))
    return Written(places, importer.segments, names)


def finish_megatron(
    hf: HFConfig, reader: Reader, out: Path, dtype: torch.dtype | None, shares: list[Written]
) -> dict[str, dict[int, str]]:
    """The index of what all ranks have written; checksums of segments by file name. ValueError when a piece lacks."""
    pieces, metadata = _plan(hf, reader, dtype)
    results = [
        WriteResult(
            MetadataIndex(key, None if at is None else torch.Size(at)), length, _StorageInfo(file, start, length)
        )
        for written in shares
        for key, at, file, start, length in written.places
    ]
    if missing := {piece.index for piece in pieces} - {result.index for result in results}:
        raise ValueError(
            f"{len(missing)} pieces were not written, the first is one of {sorted(missing, key=str)[0].fqn}"
        )
    _IndexWriter(out).finish(metadata, [results])
    # Without a version Megatron-LM takes a checkpoint for one of 2019 and looks for query, key and value to reorder.
    common = {"args": argparse.Namespace(**megatron_lm_arguments(hf)), "checkpoint_version": 3.0, "iteration": 0}
    torch.save(common, out / "common.pt")
    (out / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")
    return {file: found for written in shares for file, found in written.segments.items()}
