"""This rank's file of a checkpoint: planned by all ranks together, written by each rank, now or in the background.

The format is torch's (`torch.distributed.checkpoint`), the plan Megatron's. Files are hashed while they are written: a
hash of bytes that were read back would not detect damage during the write.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from conversion.digests import bulk_digest, text
from megatron_ext.learner.finite import all_finite

_ALIGNMENT = 64  # bytes, of tensors in the staging buffer
_POLL_S = 0.05
# On a file server another node may see a new file only after a minute. After that the directory is not shared, or a
# rank is gone.
_APPEARS_WITHIN_S = 600.0


class Staging:
    """Host memory for one copy of this rank's part, page-locked if there is a GPU, and kept for the next checkpoint."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    @torch.no_grad()
    def copy(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies that share nothing with ``tensors``; they last until the next call. Returns when all are made."""
        starts, total = [], 0
        for tensor in tensors:
            starts.append(total)
            total += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if total > self._buffer.nbytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # free the old one first
            self._buffer = torch.empty(total, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        copies = []
        for tensor, start in zip(tensors, starts, strict=True):
            room = self._buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(room.copy_(tensor, non_blocking=True))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


class _Planner(MCoreSavePlanner):
    """Megatron's plan; it writes the tensors themselves, or their copies after a call of `stage`."""

    staged: dict[MetadataIndex, Tensor] | None = None

    def stage(self, plan: SavePlan, staging: Staging) -> None:
        items = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        copies = staging.copy([super(_Planner, self).resolve_data(item) for item in items])
        self.staged = {item.index: copy for item, copy in zip(items, copies, strict=True)}

    def resolve_data(self, write_item: WriteItem) -> Any:
        """What to write. Raises FloatingPointError for a tensor with a NaN or an infinity in it."""
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        tensor = super().resolve_data(write_item) if self.staged is None else self.staged[write_item.index]
        if not all_finite(tensor):
            raise FloatingPointError(
                f"{write_item.index.fqn} holds a NaN or an infinity: no checkpoint is written, the last one stays"
            )
        return tensor


@dataclass(slots=True)
class PlannedFile:
    """This rank's part of one directory; rank 0 also has the description of the whole."""

    directory: Path
    writer: FileSystemWriter
    planner: _Planner
    plan: SavePlan
    metadata: Metadata | None

    def write(self) -> dict[str, Any]:
        """Write and sync it. Returns the positions and checksums of all pieces for `finish`, as JSON values."""
        self.writer.fs = files = _DigestingFiles()
        results = self.writer.write_data(self.plan, self.planner).wait()
        items = []
        for result in results:
            index, at = result.index, result.storage_data
            offset = None if index.offset is None else list(index.offset)
            items.append([index.fqn, offset, index.index, result.size_in_bytes, at.relative_path, at.offset, at.length])
        return {"items": items, "segments": {path.name: starts for path, starts in files.segments.items()}}

    def finish(self, written: list[dict[str, Any]]) -> dict[str, dict[int, str]]:
        """On rank 0, with the results of `write` on all ranks: write the description of the whole.

        Returns the checksum of every piece by file name and by where it begins.
        """
        assert self.metadata is not None
        self.writer.fs = FileSystem()
        self.writer.finish(self.metadata, [[_result(*item) for item in part["items"]] for part in written])
        return {
            name: {int(start): digest for start, digest in starts.items()}
            for part in written
            for name, starts in part["segments"].items()
        }


def _result(
    fqn: str, offset: list[int] | None, index: int | None, size: int, path: str, start: int, length: int
) -> WriteResult:
    return WriteResult(MetadataIndex(fqn, offset, index), size, _StorageInfo(path, start, length))


class SaveStrategy:
    """A sharded strategy of ``dist_checkpointing.save`` that plans and, with ``staging``, copies; `planned` writes."""

    backend, version = "torch_dist", 1
    can_handle_sharded_objects = True

    def __init__(self, staging: Staging | None) -> None:
        self._staging = staging
        self.planned: PlannedFile | None = None

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """A collective. ``sharded_state_dict``: Megatron's, whose main replicas are written."""
        mine, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        first = dist.get_rank() == 0
        planner = _Planner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(mine), is_coordinator=first)
        # One file per rank: a file server is fast with many writers.
        writer = FileSystemWriter(checkpoint_dir, thread_count=1, overwrite=True)
        writer.set_up_storage_writer(first)
        local = writer.prepare_local_plan(planner.create_local_plan())
        plans: list[Any] | None = [None] * dist.get_world_size() if first else None
        dist.gather_object(local, plans)
        metadata = None
        if plans is not None:
            # Refuses plans that overlap or omit a part of a tensor.
            plans, metadata = planner.create_global_plan(plans)
            plans = writer.prepare_global_plan(plans)
        received: list[Any] = [None]
        dist.scatter_object_list(received, plans)
        plan = planner.finish_plan(received[0])
        if self._staging is not None:
            planner.stage(plan, self._staging)
        self.planned = PlannedFile(Path(checkpoint_dir), writer, planner, plan, metadata)


class _DigestingFiles(FileSystem):
    """Hashes the written pieces of each file."""

    def __init__(self) -> None:
        self.segments: dict[Path, dict[int, str]] = {}  # checksums by where a piece begins

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with Path(path).open(mode) as file:
            stream = _DigestingStream(cast(BinaryIO, file))
            yield stream
        self.segments[Path(path)] = stream.segments


class _DigestingStream:
    """An append-only file, whose writer asks for the position before and after each piece."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = bulk_digest()
        self._start = self._written = 0
        self.segments: dict[int, str] = {}

    def write(self, data: Any) -> int:
        self._digest.update(data)
        count = self._file.write(data)
        self._written += count
        return count

    def tell(self) -> int:
        self._end_piece()
        return self._written

    def _end_piece(self) -> None:
        if self._written > self._start or not self._written:
            self.segments[self._start] = text(self._digest)
            self._digest, self._start = bulk_digest(), self._written

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._end_piece()
        self._file.close()


# ------------------------------------------------------------------------------- what ranks tell rank 0, through files


def _report_file(directory: Path, rank: int) -> Path:
    return directory / f".rank_{rank}.json"


def report(directory: Path, rank: int, content: dict[str, Any]) -> None:
    """Write ``content`` for rank 0 into the directory of all ranks. No collective: ranks continue to train."""
    path = _report_file(directory, rank)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, path)


def collect_reports(directory: Path, world: int, *, within_s: float = _APPEARS_WITHIN_S) -> list[dict[str, Any]]:
    """The reports of all ranks, which are removed. Waits for them as long as some file of the directory grows.

    Raises OSError for a rank that reports an ``error``, TimeoutError when nothing has happened for ``within_s``.
    """
    found: dict[int, dict[str, Any]] = {}
    deadline, seen = time.monotonic() + within_s, (0, 0)
    while len(found) < world:
        for rank in range(world):
            path = _report_file(directory, rank)
            if rank not in found and path.is_file():
                found[rank] = json.loads(path.read_text(encoding="utf-8"))
                if error := found[rank].get("error"):
                    raise OSError(f"rank {rank} could not write its part of {directory}: {error}")
                path.unlink()
        progress = (len(found), sum(path.stat().st_size for path in directory.rglob("*.distcp")))
        if progress != seen:
            deadline, seen = time.monotonic() + within_s, progress
        if time.monotonic() > deadline:
            missing = next(rank for rank in range(world) if rank not in found)
            raise TimeoutError(
                f"{directory}: nothing from rank {missing} for {within_s:.0f} s: is it on a file system that all nodes "
                "share, and is that rank alive?"
            )
        time.sleep(_POLL_S)
    return [found[rank] for rank in range(world)]
