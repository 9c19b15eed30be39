"""Megatron `dist_checkpointing` directories ("torch_dist" format), written block by block without Megatron.

The format is torch's distributed checkpoint with Megatron's keys, a `metadata.json` that names it and a `common.pt` for
everything that is not a tensor. Large tensors are stored as several pieces of whole rows, which Megatron reads into any
parallel layout. A piece is byte for byte the output of `torch.save`, but its numbers are streamed: they are read,
rearranged, hashed and written while they are in the processor's cache, and are never all in memory.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
from conversion.digests import bulk_digest, range_digest, text
from conversion.hf_files import PIECE_BYTES, WRITEBACK_BYTES, HFReader, start_writeback
from conversion.mapping import hf_parts, import_rows, megatron_names, megatron_shape, row_unit, stored_dtype
from conversion.megatron_args import megatron_lm_arguments
from conversion.megatron_keys import extra_state_keys, own_slots
from conversion.megatron_reader import BLOCK_BYTES
from conversion.pickled import PickledReader
from conversion.publish import spans
from conversion.quantised import DequantisedReader
from conversion.units import Record, Unit, cut
from conversion.values import Values

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
FORMAT |= {"common_backend": "torch", "common_backend_version": 1}
STORED_BYTES = 16 << 20  # of a piece, which a reader must check as a whole
Reader = HFReader | PickledReader | DequantisedReader | MergedReader
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

    @property
    def nbytes(self) -> int:
        return self.sizes.numel() * self.dtype.itemsize


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


class Plan:
    """All pieces of a checkpoint in the order of a forward pass, cut into files, each of which is a unit of work."""

    def __init__(self, hf: HFConfig, reader: Reader, dtype: torch.dtype | None) -> None:
        self.pieces, self.metadata = _plan(hf, reader, dtype)
        sizes: dict[str, int] = {}
        for piece in self.pieces:
            sizes[piece.name] = sizes.get(piece.name, 0) + piece.nbytes
        self.units = cut(sizes)
        self.total_bytes = sum(sizes.values())
        self._by_name: dict[str, list[_Piece]] = {}
        for piece in self.pieces:
            self._by_name.setdefault(piece.name, []).append(piece)

    def of(self, unit: Unit) -> list[_Piece]:
        """The pieces of a unit."""
        return [piece for name in unit.names for piece in self._by_name[name]]


def _plan(hf: HFConfig, reader: Reader, dtype: torch.dtype | None) -> tuple[list[_Piece], Metadata]:
    """All pieces, and the checkpoint's index but for where the pieces will lie."""
    pieces: list[_Piece] = []
    tensors: dict[str, TensorStorageMetadata] = {}
    for name in megatron_names(hf):
        shape, asked = megatron_shape(hf, name), stored_dtype(name, dtype)
        for slot in own_slots(hf, name):
            found = {reader.tensors[part].dtype for part in hf_parts(hf, name)}
            properties = TensorProperties(dtype=asked or next(iter(found)))
            whole = TensorStorageMetadata(properties, torch.Size((*slot.extents, *shape)), [])
            entry = tensors.setdefault(slot.key, whole)
            one = entry.properties.dtype
            if asked is None and found != {one}:
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
    """The bytes that `torch.save` writes before and after the numbers of a tensor; they do not depend on the numbers.

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
        """Start a new segment with its own checksum; returns its position."""
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
        start_writeback(self._fd, self._flushed, self.size - self._flushed)
        os.close(self._fd)


class _IndexWriter(dcp.FileSystemWriter):
    """Writes `.metadata` without the path of this machine's directory in it."""

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta()


class UnitWriter:
    """Writes units of a plan, a file each; safe to share between threads."""

    def __init__(self, hf: HFConfig, reader: Reader, out: Path, plan: Plan, check_finite: bool) -> None:
        self._hf, self._reader, self._out, self._plan, self._check_finite = hf, reader, out, plan, check_finite

    def write(self, unit: Unit, progress: Progress) -> Record:
        """Write the file of a unit. Its record: where its pieces lie, checksums of stretches, numbers not finite."""
        values, name = Values(self._check_finite), _file_name(unit)
        (self._out / name).unlink(missing_ok=True)  # a file of a killed attempt is not trusted
        file, places = _File(self._out / name), []
        try:
            if unit.number == 0:
                places = _extra_states(self._hf, file)
            for piece in self._plan.of(unit):
                start = file.begin_segment()
                before, after = _frame(piece.sizes, piece.dtype)
                file.write(before)
                for block in self._blocks(piece, values):
                    file.write(block.reshape(-1).view(torch.uint8).numpy().data)
                    progress(block.nbytes)
                file.write(after)
                places.append(_place(piece.index, start, file.size))
        finally:
            file.close()
        self._reader.check_rest(part for name in unit.names for part in hf_parts(self._hf, name))
        return {"places": places, "segments": file.segments(), "size": file.size, "nonfinite": values.nonfinite}

    def holds(self, unit: Unit, record: Record) -> bool:
        """Whether the file of a unit is there, with the bytes that its record promises."""
        path = self._out / _file_name(unit)
        states = [MetadataIndex(key) for key in extra_state_keys(self._hf)] if unit.number == 0 else []
        expected = [*states, *(piece.index for piece in self._plan.of(unit))]
        if [_index(key, at) for key, at, *_ in record["places"]] != expected:
            return False
        if not isinstance(record["nonfinite"], dict) or not path.is_file() or path.stat().st_size != record["size"]:
            return False
        stretches = spans({"size": record["size"], "segments": record["segments"]})
        return list(stretches)[:1] == [0] and all(
            range_digest(path, start, stop) == digest for start, (stop, digest) in stretches.items()
        )

    def _blocks(self, piece: _Piece, values: Values) -> Iterator[Tensor]:
        row_bytes = piece.dtype.itemsize * (piece.sizes.numel() // (piece.stop - piece.start))
        step = _step(BLOCK_BYTES, row_unit(self._hf, piece.name), row_bytes)

        def rows(name: str, low: int, high: int) -> Tensor:
            return values.cast(name, self._reader.rows(name, low, high), piece.dtype)

        for start in range(piece.start, piece.stop, step):
            yield import_rows(self._hf, piece.name, start, min(start + step, piece.stop), rows)


def _file_name(unit: Unit) -> str:
    return f"__0_{unit.number}.distcp"


def _extra_states(hf: HFConfig, file: _File) -> list[Place]:
    nothing = io.BytesIO()
    torch.save([None], nothing)
    places = []
    for key in extra_state_keys(hf):
        start = file.size
        file.write(nothing.getbuffer())
        places.append(_place(MetadataIndex(key), start, file.size))
    return places


Place = tuple[str, list[int] | None, int, int]  # key, offsets, where it begins in its file, its length


def _place(index: MetadataIndex, start: int, end: int) -> Place:
    return index.fqn, None if index.offset is None else list(index.offset), start, end - start


def _index(key: str, offsets: list[int] | None) -> MetadataIndex:
    return MetadataIndex(key, None if offsets is None else torch.Size(offsets))


def finish_megatron(hf: HFConfig, out: Path, plan: Plan, records: Sequence[Record]) -> dict[str, dict[int, str]]:
    """Write the index of all units; checksums of stretches by file name. ValueError when a piece was not written."""
    results, segments = [], {}
    for unit, record in zip(plan.units, records, strict=True):
        file = _file_name(unit)
        segments[file] = {int(start): digest for start, digest in record["segments"].items()}
        for key, at, start, length in record["places"]:
            results.append(WriteResult(_index(key, at), length, _StorageInfo(file, start, length)))
    if missing := {piece.index for piece in plan.pieces} - {result.index for result in results}:
        raise ValueError(f"{len(missing)} pieces were not written, one of {sorted(missing, key=str)[0].fqn}")
    _IndexWriter(out).finish(plan.metadata, [results])
    # Without a version Megatron-LM takes a checkpoint for one of 2019 and looks for query, key and value to reorder.
    common = {"args": argparse.Namespace(**megatron_lm_arguments(hf)), "checkpoint_version": 3.0, "iteration": 0}
    torch.save(common, out / "common.pt")
    (out / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")
    return segments
