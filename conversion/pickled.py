"""Hugging Face directories whose weights are pickles (`pytorch_model.bin`), for those who ask for it.

`torch.load(weights_only=True)` rebuilds tensors and plain containers and refuses everything else, so a hostile file
cannot run code as far as torch's unpickler is sound. It has had a hole before (CVE-2025-32434), which is why this takes
a flag. Files are mapped, not read: pages come in as they are used and the kernel takes them back at will.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from conversion.hf_files import FLOAT8, NAMES, HFReader, read_index
from conversion.locate import refuse_lfs_pointer
from conversion.quantised import DequantisedReader

INDEX, SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"


class PickledReader:
    """As `HFReader`, for pickled weights.

    Raises:
        ValueError: nothing there, an index that names files outside the directory, a file that is truncated or holds
            anything but dense floating-point tensors by name; says which.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.tensors: dict[str, Tensor] = {}
        expected = read_index(self.directory / INDEX, ".bin")
        for file in sorted(set(expected.values())) or [SINGLE]:
            for name, tensor in _load(self.directory / file).items():
                if name in self.tensors:
                    raise ValueError(f"tensor {name!r} is in more than one file of {self.directory}")
                self.tensors[name] = tensor
        if missing := sorted(set(expected) - set(self.tensors)):
            raise ValueError(f"{INDEX} lists tensors that no file contains: {', '.join(missing[:8])}")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, in memory of their own. KeyError for an unknown name."""
        return self.tensors[name][start:stop].clone(memory_format=torch.contiguous_format)

    def __call__(self, name: str) -> Tensor:
        return self.rows(name, 0, self.tensors[name].shape[0])

    def check_rest(self, names: Iterable[str]) -> str:
        """Manifests of this project describe no pickles."""
        return "the source has no manifest to compare with"

    def close(self) -> None:
        self.tensors = {}


def open_hf(directory: str | Path, *, allow_pickle: bool = False) -> HFReader | PickledReader | DequantisedReader:
    """The weights of a Hugging Face directory: safetensors where there are any. Errors as those of the readers."""
    directory = Path(directory)
    pickled = any((directory / name).is_file() for name in (INDEX, SINGLE))
    if not pickled or any(directory.glob("*.safetensors")):
        reader = HFReader(directory)
        if any(where.dtype == FLOAT8 for where in reader.tensors.values()):
            return DequantisedReader(reader)
        return reader
    if not allow_pickle:
        raise ValueError(
            f"{directory} has pickled weights only: pass --allow-pickle if you trust where they come from "
            "(they are opened with weights_only=True), or use the model's safetensors"
        )
    return PickledReader(directory)


def _load(path: Path) -> dict[str, Tensor]:
    refuse_lfs_pointer(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ").split(" Please ")[0]
        raise ValueError(f"{path} holds more than tensors and was refused ({reason[:200]})") from error
    except (RuntimeError, OSError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is truncated or not in torch's zip format ({reason[:120]}): download it again"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not tensors by name")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided):
            raise ValueError(f"{path} holds {name!r}, which is not a dense tensor: refused")
        if tensor.dtype not in NAMES or tensor.ndim == 0:
            raise ValueError(
                f"tensor {name!r} in {path.name} is {tensor.dtype} {tuple(tensor.shape)}, which conversion does not "
                f"know: convert the checkpoint to one of {', '.join(NAMES.values())} first"
            )
    return dict(state)
