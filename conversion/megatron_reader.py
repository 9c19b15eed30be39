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
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from conversion.config import HFConfig
from conversion.digests import range_digest
from conversion.hf_files import NAMES
from conversion.locate import RELEASE, require
from conversion.mapping import megatron_shape, row_unit
from conversion.megatron_keys import Slot, find_slots
from conversion.parse import read_config
from conversion.publish import ManifestError, check_file, check_manifest, spans
from conversion.sharding import VOCAB_TENSORS
from conversion.stored_pieces import PieceReader

BLOCK_BYTES = 1 << 20  # read, taken apart and written at a time: stays in a core's cache
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
        directory: in the "torch_dist" format, written by this project or by Megatron; or a root with Megatron-LM's
            tracker file, which names it.
        hf_dir: where config.json is; default the checkpoint's own `hf` directory, or that of the `release` beside it.

    Raises:
        FileNotFoundError, ValueError: not such a directory, damaged, no config.json, or its tensors are not those that
            the config implies; says which.
    """

    def __init__(self, directory: str | Path, hf_dir: str | Path | None = None) -> None:
        self.directory = require(directory, "Megatron", "conversion.hf_to_megatron")
        own, sibling = self.directory / HF_FILES, self.directory.parent / RELEASE / HF_FILES
        self.hf_dir = Path(hf_dir) if hf_dir else own if own.is_dir() or not sibling.is_dir() else sibling
        self.manifest = check_manifest(self.directory, contents=False)
        self._metadata = read_metadata(self.directory)
        if not (self.hf_dir / "config.json").is_file():
            raise FileNotFoundError(f"{self.directory} has no {HF_FILES}/config.json: give one with --hf-config DIR")
        self.hf: HFConfig = read_config(self.hf_dir)
        self._slots = find_slots(self.hf, tensor_keys(self._metadata))
        self._pieces = _pieces(self._metadata, {slot.key: len(slot.lead) for slot in self._slots.values()})
        self._entries = (self.manifest or {"files": {}})["files"]
        self._whole: set[str] = set()  # files that were compared as a whole
        self._reader = PieceReader(self.directory, self._metadata, {n: spans(e) for n, e in self._entries.items()})
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

    def blocks(self, name: str, memory: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) that together are the full tensor, in order, in blocks of about BLOCK_BYTES.

        Vocabulary padding stays on. ValueError when a part was not stored or its bytes are damaged.

        Args:
            memory: uint8, used for every block that fits: each block is then valid until the next one is requested.
        """
        slot = self._slots[name]
        rows, *tail = self._tensor(slot.key).size[len(slot.lead) :]
        unit = row_unit(self.hf, name)
        step = max(BLOCK_BYTES // (self.dtype(name).itemsize * math.prod(tail) * unit), 1) * unit
        for start in range(0, rows, step):
            yield start, self.rows(name, start, min(start + step, rows), memory)

    def rows(self, name: str, start: int, stop: int, memory: Tensor | None = None) -> Tensor:
        """Rows [start, stop) of the full tensor; `memory` and errors as `blocks`."""
        slot = self._slots[name]
        shape, dtype = (stop - start, *self._tensor(slot.key).size[len(slot.lead) + 1 :]), self.dtype(name)
        size = math.prod(shape) * dtype.itemsize
        if memory is None or memory.numel() < size:
            memory = torch.empty(size, dtype=torch.uint8)
        block = memory[:size].view(dtype).view(shape)
        if self._fill(slot, self._pieces[slot.key, slot.lead], start, block) != block.numel():
            raise ValueError(f"{slot.key} is not stored completely: {self.directory} was not written to its end")
        return block

    def check_rest(self, names: Iterable[str] | None = None) -> str:
        """Compare with the manifest what reading parameters has not: stretches that were not read in order.

        Of the named parameters, or of all. Whole files where an older manifest knows no stretches. Returns a sentence
        on what was compared; ManifestError names the tensor and the file.
        """
        if self.manifest is None:
            return "the source has no manifest to compare with"
        places, whole = self._metadata.storage_data or {}, set()
        for slot in [self._slots[name] for name in (self._slots if names is None else names)]:
            for piece in self._pieces[slot.key, slot.lead]:
                place = places[MetadataIndex(slot.key, piece.offsets)]
                if (place.relative_path, place.offset) in self._reader.checked:
                    continue
                entry = self._entries.get(place.relative_path)
                if entry is None:
                    raise ManifestError(f"the manifest of {self.directory} does not list {place.relative_path}")
                end, digest = spans(entry).get(place.offset, (0, ""))
                if end < place.offset + place.length:
                    whole.add(place.relative_path)
                elif range_digest(self.directory / place.relative_path, place.offset, end) != digest:
                    raise ManifestError(
                        f"{slot.key} in {self.directory / place.relative_path} does not have the bytes that the "
                        "manifest promises: copy the checkpoint again"
                    )
        for name in sorted(whole - self._whole):
            check_file(self.directory / name, self._entries[name])
            self._whole.add(name)
        return "every byte read is what the source's manifest promises"

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
        raise ValueError(f"{directory / 'metadata.json'} is not valid checkpoint metadata ({error!r})") from error
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
