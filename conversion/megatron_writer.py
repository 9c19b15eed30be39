"""Megatron `dist_checkpointing` directories ("torch_dist" format), written block by block without Megatron.

The format is torch's distributed checkpoint with keys of Megatron's choosing, a `metadata.json` that names it and a
`common.pt` for what is not a tensor. Large tensors are stored as several blocks of rows; Megatron reads any blocks into
any parallel layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from conversion.config import HFConfig
from conversion.hf_files import PIECE_BYTES, HFReader, start_writeback
from conversion.mapping import hf_parts, import_rows, megatron_names, megatron_shape, row_unit
from conversion.megatron_keys import extra_state_keys, stacked_slots

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
FORMAT |= {"common_backend": "torch", "common_backend_version": 1}
BLOCK_BYTES = 4 << 20  # per thread, a few blocks are in memory at a time
WRITEBACK_BYTES = 16 << 20
Progress = Callable[[int], object]  # called with a number of bytes done, from any thread


def _blocks(hf: HFConfig, name: str, itemsize: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at most BLOCK_BYTES (or one unit) that cover a Megatron tensor.

    Where parts are stacked, a block ends with its part: it is then read straight from one Hugging Face tensor.
    """
    rows, *rest = megatron_shape(hf, name)
    unit = row_unit(hf, name)
    step = max(BLOCK_BYTES // (itemsize * math.prod(rest) * unit), 1) * unit
    parts = [shape[0] for shape in hf_parts(hf, name).values()] if unit == 1 else [rows]
    for stop, count in zip(itertools.accumulate(parts), parts, strict=True):
        yield from ((start, min(start + step, stop)) for start in range(stop - count, stop, step))


class _ImportPlanner(SavePlanner):
    """Plans every block of the model and makes each only when it is about to be written."""

    def __init__(self, hf: HFConfig, reader: HFReader, dtype: torch.dtype | None, progress: Progress) -> None:
        self._hf, self._reader, self._progress = hf, reader, progress
        self._sources: dict[tuple[str, torch.Size], tuple[str, int, int]] = {}
        self._dtype = dtype
        self._nothing = io.BytesIO()
        torch.save([None], self._nothing)

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        pass

    def _dtype_of(self, name: str, key: str, seen: dict[str, torch.dtype]) -> torch.dtype:
        found = {self._reader.tensors[part].dtype for part in hf_parts(self._hf, name)}
        dtype = seen.setdefault(key, self._dtype or next(iter(found)))
        if self._dtype is None and found != {dtype}:
            raise ValueError(f"{key} would mix {', '.join(sorted(map(str, found | {dtype})))}: choose one with --dtype")
        return dtype

    def create_local_plan(self) -> SavePlan:
        items: list[WriteItem] = []
        seen: dict[str, torch.dtype] = {}
        for name in megatron_names(self._hf):
            shape = megatron_shape(self._hf, name)
            for slot in stacked_slots(self._hf, name):
                properties = TensorProperties(dtype=self._dtype_of(name, slot.key, seen))
                for start, stop in _blocks(self._hf, name, properties.dtype.itemsize):
                    offsets = torch.Size((*slot.lead, start, *(0 for _ in shape[1:])))
                    sizes = torch.Size((*(1 for _ in slot.lead), stop - start, *shape[1:]))
                    data = TensorWriteData(
                        ChunkStorageMetadata(offsets, sizes), properties, torch.Size((*slot.extents, *shape))
                    )
                    items.append(WriteItem(MetadataIndex(slot.key, offsets), WriteItemType.SHARD, tensor_data=data))
                    self._sources[slot.key, offsets] = name, start, stop
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in extra_state_keys(self._hf)]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.tensor_data is None:
            return self._nothing
        offset = write_item.index.offset
        assert offset is not None
        name, start, stop = self._sources[write_item.index.fqn, offset]
        block = import_rows(self._hf, name, start, stop, self._reader.rows)
        block = block.to(write_item.tensor_data.properties.dtype).reshape(write_item.tensor_data.chunk.sizes)
        self._progress(block.nbytes)
        return block


class _Hashing(io.RawIOBase):
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self.digest = hashlib.sha256()
        self._at = self._flushed = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            written = self._file.write(view[done : done + PIECE_BYTES]) or 0
            self.digest.update(view[done : done + written])
            done += written
        self._at += done
        if self._at - self._flushed >= WRITEBACK_BYTES:
            start_writeback(self.fileno(), self._flushed, self._at - self._flushed)
            self._flushed = self._at
        return done

    def tell(self) -> int:
        return self._at

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
        super().close()


class _HashingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with _Hashing(Path(path)) as hashing:
            yield hashing
        self.digests[Path(path).name] = hashing.digest.hexdigest()


class _Writer(dcp.FileSystemWriter):
    """torch's writer with a file per thread, whose errors are not lost, and without a path in its metadata."""

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(path, thread_count=1, per_thread_copy_ahead=0)
        self.fs = self.hashing = _HashingFileSystem()
        self._threads = threads

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with ThreadPoolExecutor(self._threads) as pool:
            parts = pool.map(lambda number: self._write_part(number, plan, planner), range(self._threads))
            results = list(itertools.chain.from_iterable(parts))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_part(self, number: int, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        part = dataclasses.replace(
            plan,
            items=plan.items[number :: self._threads],  # all threads read near the same place
            storage_data=dataclasses.replace(plan.storage_data, prefix=f"__{number}_"),
        )
        return list(super().write_data(part, planner).wait())


def write_megatron(
    hf: HFConfig, reader: HFReader, out: Path, *, dtype: torch.dtype | None, threads: int, progress: Progress
) -> dict[str, str]:
    """Write a Hugging Face checkpoint as a Megatron one into an empty directory; SHA-256 by file name.

    The vocabulary is stored without padding, so any tensor-parallel size can load it.
    """
    writer = _Writer(out, threads)
    previous = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # every file has a SHA-256 in the manifest
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "torch.distributed is disabled": intended
            dcp.save({}, storage_writer=writer, planner=_ImportPlanner(hf, reader, dtype, progress), no_dist=True)
    except dcp.CheckpointException as wrapped:
        (error, _), *_ = wrapped.failures.values()  # torch wraps what happened once more for every rank
        raise error from wrapped
    finally:
        torch.serialization.set_crc32_options(previous)
    torch.save({}, out / "common.pt")
    (out / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")
    return {name.removesuffix(".tmp"): digest for name, digest in writer.hashing.digests.items()}
