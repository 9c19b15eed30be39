"""One view of the two kinds of checkpoint: rows of Megatron parameters, read from either."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from conversion.config import HFConfig
from conversion.locate import locate
from conversion.mapping import hf_parts, hf_shapes, import_rows, unconsumed
from conversion.megatron_reader import MegatronReader
from conversion.parse import read_config
from conversion.pickled import open_hf


class Source(Protocol):
    """A checkpoint opened for reading, block by block; safe to share between threads."""

    directory: Path
    hf: HFConfig
    kind: str  # "Hugging Face" | "Megatron"

    def rows(self, megatron_name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a full Megatron parameter, without vocabulary padding, in the stored dtype."""

    def dtypes(self) -> dict[str, torch.dtype]:
        """By Hugging Face name, without reading any tensor."""

    def check_rest(self) -> str:
        """Compare with the manifest what `rows` has not; see the readers."""


class HFSource:
    kind = "Hugging Face"

    def __init__(self, directory: Path, allow_pickle: bool = False) -> None:
        self.directory = directory
        self.hf = read_config(directory)
        self._reader = open_hf(directory, allow_pickle=allow_pickle)
        names = self._reader.tensors
        if odd := sorted(set(hf_shapes(self.hf)) - set(names)) + unconsumed(self.hf, names):
            raise ValueError(f"{directory}: missing or unknown tensors: {', '.join(odd[:8])}")

    def rows(self, megatron_name: str, start: int, stop: int) -> Tensor:
        return import_rows(self.hf, megatron_name, start, stop, self._reader.rows)

    def check_rest(self) -> str:
        return self._reader.check_rest(hf_shapes(self.hf))

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: self._reader.tensors[name].dtype for name in hf_shapes(self.hf)}


class MegatronSource:
    kind = "Megatron"

    def __init__(self, directory: Path, hf_config: Path | None = None) -> None:
        self.directory = directory
        self.reader = MegatronReader(directory, hf_config)
        self.hf = self.reader.hf

    def rows(self, megatron_name: str, start: int, stop: int) -> Tensor:
        return self.reader.rows(megatron_name, start, stop)

    def check_rest(self) -> str:
        return self.reader.check_rest()

    def dtypes(self) -> dict[str, torch.dtype]:
        return {p: self.reader.dtype(name) for name in self.reader.names() for p in hf_parts(self.hf, name)}


def open_source(directory: str | Path, hf_config: str | Path | None = None, *, allow_pickle: bool = False) -> Source:
    """Open a directory of either kind; errors as `locate` and the readers."""
    kind, found = locate(directory)
    if kind == "Megatron":
        return MegatronSource(found, Path(hf_config) if hf_config else None)
    return HFSource(found, allow_pickle)
