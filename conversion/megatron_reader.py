"""Megatron `dist_checkpointing` directories read block by block, without Megatron and without trusting their pickles.

`.metadata` is a pickle: it is read with an unpickler that knows only the plain records of torch's checkpoint format, so
it cannot run code wherever it comes from. `common.pt` is never opened. Tensors are read with `weights_only=True`.
"""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

from conversion.config import HFConfig
from conversion.hf_files import NAMES
from conversion.mapping import megatron_shape, row_unit
from conversion.megatron_keys import Slot, find_slots
from conversion.parse import read_config
from conversion.publish import check_manifest
from conversion.sharding import VOCAB_TENSORS
from conversion.stored_pieces import PieceReader

BLOCK_BYTES = 1 << 22  # read, taken apart and written at a time: stays in a core's cache
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
        self._reader = PieceReader(self.directory, self._metadata)
        for name, slot in self._slots.items():
            self._check(name, slot)

    def _check(self, name: str, slot: Slot) -> None:
        if (dtype := self.dtype(name)) not in NAMES:
            raise ValueError(
                f"{slot.key} is stored as {dtype}, which has no meaning without its scales: save it from Megatron in "
                f"one of {', '.join(NAMES.values())}"
            )
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
        """(first row, rows) that together are the full tensor, in order, in blocks of about BLOCK_BYTES.

        Vocabulary padding stays on. ValueError when a part was not stored or its bytes are damaged.
        """
        slot = self._slots[name]
        stored = self._tensor(slot.key)
        pieces = self._pieces[slot.key, slot.lead]
        axis = len(slot.lead)
        rows, *tail = stored.size[axis:]
        unit = row_unit(self.hf, name)
        step = max(BLOCK_BYTES // (stored.properties.dtype.itemsize * math.prod(tail) * unit), 1) * unit
        for start in range(0, rows, step):
            block = torch.empty(min(step, rows - start), *tail, dtype=stored.properties.dtype)
            if self._fill(slot, pieces, start, block) != block.numel():
                raise ValueError(f"{slot.key} is not stored completely: {self.directory} was not written to its end")
            yield start, block

    def _fill(self, slot: Slot, pieces: Iterable[ChunkStorageMetadata], start: int, block: Tensor) -> int:
        """Copy what the pieces hold of the rows from `start` on into `block`; how many numbers that were."""
        axis, filled = len(slot.lead), 0
        for piece in pieces:
            top, *left = piece.offsets[axis:]
            rows, *extents = piece.sizes[axis:]
            low, high = max(start, top), min(start + len(block), top + rows)
            if low >= high:
                continue
            part = block[low - start : high - start]
            for dimension, (offset, extent) in enumerate(zip(left, extents, strict=True), start=1):
                part = part.narrow(dimension, offset, extent)
            lead = [own - first for own, first in zip(slot.lead, piece.offsets, strict=False)]
            self._reader.read(slot.key, piece, lead, low - top, part)
            filled += part.numel()
        return filled


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
