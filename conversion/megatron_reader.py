"""Megatron `dist_checkpointing` directories read block by block, without Megatron and without trusting their pickles.

`.metadata` is a pickle: it is read with an unpickler that knows only the plain records of torch's checkpoint format, so
it cannot run code wherever it comes from. `common.pt` is never opened. Tensors are read with `weights_only=True`.
"""

from __future__ import annotations

import io
import itertools
import json
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from conversion.config import HFConfig, read_config
from conversion.mapping import megatron_shape, row_unit
from conversion.megatron_keys import Slot, find_slots
from conversion.publish import check_manifest
from conversion.sharding import VOCAB_TENSORS

HF_FILES = "hf"  # directory inside a Megatron checkpoint with config.json, tokenizer and the like

_CHECKPOINT = "torch.distributed.checkpoint."
_ALLOWED = {
    _CHECKPOINT + "metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    _CHECKPOINT + "planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    _CHECKPOINT + "filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}


class _Opaque:
    """Stands in for Megatron's own plan records, which hold nothing that is needed here."""

    def __setstate__(self, state: Any) -> None:
        pass


class SafeUnpickler(pickle.Unpickler):
    """Reads `.metadata`; UnpicklingError for anything but the records listed above."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "megatron.core.dist_checkpointing.strategies.torch" and name.startswith("MCore"):
            return _Opaque
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata: refused")


class _IntoBlock(LoadPlanner):
    """Gives torch's reader the part of `block` that a stored piece belongs to."""

    def __init__(self, block: Tensor) -> None:
        self._block = block

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._block
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, offset, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class MegatronReader:
    """Parameters of a Megatron checkpoint by their local-spec names; safe to share between threads.

    Args:
        directory: a directory in the "torch_dist" format, written by this project or by Megatron.
        hf_dir: where config.json is; default the checkpoint's own `hf` directory.

    Raises:
        FileNotFoundError, ValueError: not such a directory, damaged, no config.json, or its tensors are not those that
            the config implies; says which.
    """

    def __init__(self, directory: str | Path, hf_dir: str | Path | None = None) -> None:
        self.directory = Path(directory)
        self.hf_dir = Path(hf_dir) if hf_dir else self.directory / HF_FILES
        self.manifest = check_manifest(self.directory, contents=False)
        self._metadata = read_metadata(self.directory)
        if not (self.hf_dir / "config.json").is_file():
            raise FileNotFoundError(f"{self.directory} has no {HF_FILES}/config.json: give one with --hf-config DIR")
        self.hf: HFConfig = read_config(self.hf_dir)
        self._slots = find_slots(self.hf, tensor_keys(self._metadata))
        self._pieces = _pieces(self._metadata, {slot.key: len(slot.lead) for slot in self._slots.values()})
        self._reader = dcp.FileSystemReader(self.directory)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        for name, slot in self._slots.items():
            self._check(name, slot)

    def _check(self, name: str, slot: Slot) -> None:
        stored, shape = self._tensor(slot.key).size, megatron_shape(self.hf, name)
        own = tuple(stored[len(slot.lead) :])
        padded = name in VOCAB_TENSORS and own[0] >= shape[0] and own[1:] == shape[1:]
        if tuple(stored[: len(slot.lead)]) != slot.extents or not (own == shape or padded):
            raise ValueError(
                f"{slot.key} has shape {tuple(stored)} but the config implies {(*slot.extents, *shape)}: "
                "config.json belongs to another model"
            )

    def _tensor(self, key: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        return entry

    def names(self) -> list[str]:
        """Local-spec names in the order of a forward pass."""
        return list(self._slots)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor(self._slots[name].key).properties.dtype

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) that together are the full tensor, in order, cut where the stored pieces allow it.

        Vocabulary padding stays on. ValueError when a part was not stored or its bytes are damaged.
        """
        slot = self._slots[name]
        stored = self._tensor(slot.key)
        pieces = self._pieces[slot.key, slot.lead]
        axis = len(slot.lead)
        tail = stored.size[axis + 1 :]
        end = 0
        for start, stop in _row_ranges(pieces, axis, row_unit(self.hf, name)):
            if start != end:
                break
            end = stop
            box = ChunkStorageMetadata(
                torch.Size((*slot.lead, start, *(0 for _ in tail))),
                torch.Size((*(1 for _ in slot.lead), stop - start, *tail)),
            )
            block = torch.empty(box.sizes, dtype=stored.properties.dtype)
            here = TensorStorageMetadata(stored.properties, stored.size, pieces)
            items = create_read_items_for_chunk_list(slot.key, here, [box])
            if sum(item.lengths.numel() for item in items) != block.numel():
                raise ValueError(f"{slot.key} is not stored completely: {self.directory} was not written to its end")
            try:
                self._reader.read_data(LoadPlan(items), _IntoBlock(block))
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise ValueError(f"a stored piece of {slot.key} is damaged ({error}): copy the checkpoint") from error
            yield start, block.reshape(stop - start, *tail)
        if end != stored.size[axis]:
            raise ValueError(f"{slot.key} is not stored completely: rows from {end} on are missing")


def read_metadata(directory: Path) -> Metadata:
    """The index of a "torch_dist" checkpoint, read without running code. Errors as `MegatronReader`."""
    try:
        backend = json.loads((directory / "metadata.json").read_text(encoding="utf-8"))["sharded_backend"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{directory} is not a Megatron checkpoint: it has no metadata.json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / 'metadata.json'} cannot be understood ({error!r})") from error
    if backend != "torch_dist":
        raise ValueError(f"{directory} is in Megatron's {backend!r} format: only 'torch_dist' is supported")
    try:
        with (directory / ".metadata").open("rb") as file:
            metadata = SafeUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{directory / '.metadata'} cannot be read ({error})") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{directory / '.metadata'} does not hold checkpoint metadata")
    for info in (metadata.storage_data or {}).values():
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"{directory / '.metadata'} names {info.relative_path!r}, not a plain file name: refused")
    return metadata


def tensor_keys(metadata: Metadata) -> list[str]:
    """Keys of the tensors in a checkpoint (other entries are pickled objects)."""
    return [key for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)]


def _pieces(
    metadata: Metadata, lead_axes: dict[str, int]
) -> dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]]:
    """Stored pieces by key and position on the leading axes."""
    found: dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]] = defaultdict(list)
    for key, axes in lead_axes.items():
        entry = metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        for piece in entry.chunks:
            spans = zip(piece.offsets[:axes], piece.sizes[:axes], strict=True)
            for lead in itertools.product(*(range(low, low + extent) for low, extent in spans)):
                found[key, lead].append(piece)
    return found


def _row_ranges(pieces: Iterable[ChunkStorageMetadata], axis: int, unit: int) -> Iterator[tuple[int, int]]:
    """The finest row ranges that cut no piece in two and begin and end at multiples of `unit`."""
    start = stop = 0
    for low, high in sorted((piece.offsets[axis], piece.offsets[axis] + piece.sizes[axis]) for piece in pieces):
        if low >= stop and low % unit == 0:
            if stop > start:
                yield start, stop
            start = low
        stop = max(stop, high)
    if stop > start:
        yield start, stop
