"""Conversion by NVIDIA's Megatron-Bridge, for architectures that have no table here; where it is installed.

Its `AutoBridge` does the work (https://docs.nvidia.com/nemo/megatron-bridge/latest/bridge-guide.html, read and tried in
0.3.1): it builds the whole model in memory and needs Transformer Engine, hence CUDA. Kept are the rules of this
package about what is replaced, that output appears complete or not at all, and that no code of a checkpoint is run.
What is lost: checksums of the source, counts of numbers, resuming, sharing. The learner does not train what it makes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from conversion.families import FAMILIES
from conversion.fields import Fields
from conversion.hf_files import copy_side_files
from conversion.locate import locate, require
from conversion.megatron_reader import HF_FILES
from conversion.parse import read_raw
from conversion.publish import published, write_manifest

BACKENDS = ("auto", "own", "megatron-bridge")
PACKAGE = "megatron.bridge"


def wanted(backend: str, hf_dir: Path) -> bool:
    """Whether Megatron-Bridge is to convert the model in a directory with config.json.

    "auto" takes it for an architecture without a table, where it is installed. ValueError when it is asked for and
    is not.
    """
    if backend == "own":
        return False
    if backend == "megatron-bridge":
        _package()
        return True
    architectures = Fields(read_raw(hf_dir)).strings("architectures") or [""]
    if architectures[0] in FAMILIES:
        return False
    try:
        _package()
    except ValueError:
        return False  # the sentence about the architecture says more
    return True


def _package() -> Any:
    try:
        return importlib.import_module(PACKAGE)
    except ImportError as error:
        raise ValueError(
            f"--backend megatron-bridge: the package cannot be imported ({error}); install megatron-bridge with "
            "Transformer Engine on a machine with CUDA, or use --backend own"
        ) from error


def refuse_options(given: Mapping[str, Any]) -> None:
    """ValueError for options that Megatron-Bridge has no counterpart of, given by name and value."""
    if names := [name for name, value in given.items() if value]:
        raise ValueError(f"{', '.join(names)}: not with Megatron-Bridge, which has no counterpart of it")


def import_checkpoint(hf_dir: str | Path, out: str | Path, *, dtype: torch.dtype | None, overwrite: bool) -> str:
    """Hugging Face directory -> root of a Megatron-LM checkpoint; a sentence on what did it."""
    package, hf_dir = _package(), require(hf_dir, "Hugging Face", "conversion.megatron_to_hf")
    options = {} if dtype is None else {"torch_dtype": dtype}
    with published(out, overwrite, [hf_dir]) as partial:
        with _told(package):
            package.AutoBridge.import_ckpt(str(hf_dir), str(partial), trust_remote_code=False, **options)
        kind, checkpoint = locate(partial)
        if kind != "Megatron" or checkpoint == partial:
            raise ValueError(f"Megatron-Bridge {_version(package)} wrote no checkpoint with a tracker file")
        copy_side_files(hf_dir, checkpoint / HF_FILES)
        write_manifest(partial, base_model=hf_dir.resolve().name, converted_by=f"Megatron-Bridge {_version(package)}")
    return _sentence(package)


def export_checkpoint(
    megatron_dir: str | Path, out: str | Path, hf_config: str | Path | None, *, overwrite: bool
) -> str:
    """Megatron checkpoint -> Hugging Face directory. `hf_config`: the model's own directory, default that inside."""
    package, found = _package(), require(megatron_dir, "Megatron", "conversion.hf_to_megatron")
    model = Path(hf_config) if hf_config else found / HF_FILES
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"{found} has no {HF_FILES}/config.json: give the model's directory with --hf-config")
    with published(out, overwrite, [found, model]) as partial:
        with _told(package):
            bridge = package.AutoBridge.from_hf_pretrained(str(model), trust_remote_code=False)
            bridge.export_ckpt(str(found), str(partial), show_progress=False, strict=True)
        for script in partial.rglob("*.py"):
            script.unlink()  # no code travels
        if not any(partial.glob("*.safetensors")):
            raise ValueError(f"Megatron-Bridge {_version(package)} wrote no *.safetensors")
        write_manifest(partial, converted_by=f"Megatron-Bridge {_version(package)}")
    return _sentence(package)


def _version(package: Any) -> str:
    return str(getattr(package, "__version__", "of an unknown version"))


def _sentence(package: Any) -> str:
    return (
        f"converted by Megatron-Bridge {_version(package)}, because there is no table here: neither checked against a "
        "manifest nor compared with transformers, and not trained by the learner"
    )


class _told:
    """Whatever Megatron-Bridge raises becomes one sentence."""

    def __init__(self, package: Any) -> None:
        self._version = _version(package)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"Megatron-Bridge {self._version} failed: {text}") from error
