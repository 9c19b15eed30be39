"""Recognise the kind of checkpoint at a path, with an error that says what to do if there is none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal, NamedTuple

from conversion.publish import TRACKER

RELEASE = "release"  # Megatron-LM's name for a checkpoint that no training step of its own wrote
_LFS = b"version https://git-lfs"
_LEGACY = "mp_rank_*"


class Located(NamedTuple):
    """A checkpoint on disk."""

    kind: Literal["Hugging Face", "Megatron"]
    directory: Path  # the one with the tensors: within a root of Megatron-LM the one that its tracker file names


def locate(path: str | Path) -> Located:
    """Which kind of checkpoint a path is.

    Raises:
        FileNotFoundError, ValueError: none that can be read; says what it is instead and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist{_hub_advice(str(path))}")
    if not path.is_dir():
        raise ValueError(f"{path} is a file: give the directory that it is in")
    if _is_torch_dist(path):
        return Located("Megatron", path)
    if (path / "config.json").is_file():
        return Located("Hugging Face", path)
    if (path / "metadata.json").is_file():
        return Located("Megatron", path)  # whoever reads it says what is wrong with it
    if (path / TRACKER).is_file():
        return Located("Megatron", _tracked(path))
    if any(path.glob(_LEGACY)):
        raise _legacy(path)
    if (path / ".metadata").is_file():
        raise ValueError(
            f"{path} is in torch's own checkpoint format (torch_dcp or fsdp_dtensor): load it in Megatron-LM and save "
            "it with --ckpt-format torch_dist"
        )
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{path} is an adapter without its base model: give the base model with --hf")
    if inside := sorted(p.name for p in (*path.glob("iter_[0-9]*"), *path.glob(RELEASE), *path.glob("step_[0-9]*"))):
        raise ValueError(f"{path} holds the checkpoints {', '.join(inside[:6])} and no {TRACKER}: name one of them")
    if any(path.glob("*.gguf")):
        raise ValueError(f"{path} holds GGUF files: convert the model's safetensors instead")
    raise FileNotFoundError(f"{path} has neither config.json (Hugging Face) nor metadata.json (Megatron)")


def require(path: str | Path, kind: Literal["Hugging Face", "Megatron"], instead: str) -> Path:
    """The directory of a checkpoint of one kind; ValueError that names the command `instead` for the other kind."""
    found = locate(path)
    if found.kind != kind:
        raise ValueError(f"{path} is a {found.kind} checkpoint: use {instead}")
    return found.directory


def refuse_lfs_pointer(path: Path) -> None:
    """ValueError when git has checked out a pointer where the file itself should be."""
    if path.stat().st_size < 1024:
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise ValueError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` there")


def _is_torch_dist(path: Path) -> bool:
    try:
        return "sharded_backend" in json.loads((path / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _tracked(root: Path) -> Path:
    """The checkpoint that Megatron-LM would load from a directory (`--load`)."""
    name = (root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if name != RELEASE and not re.fullmatch(r"[0-9]{1,12}", name):
        raise ValueError(f"{root / TRACKER} holds {name[:40]!r}, neither a step nor {RELEASE!r}: name the checkpoint")
    directory = root / (name if name == RELEASE else f"iter_{int(name):07d}")
    if not directory.is_dir():
        raise ValueError(f"{root / TRACKER} names {directory.name}, which is not there: name another checkpoint")
    if any(directory.glob(_LEGACY)):
        raise _legacy(directory)
    return directory


def _legacy(path: Path) -> ValueError:
    return ValueError(
        f"{path} is in Megatron-LM's legacy format (mp_rank_*, pickles): load it in Megatron-LM and save it with "
        "--ckpt-format torch_dist"
    )


def _hub_advice(path: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) and not Path(path).parent.exists():
        return f" here; if it is a model of the Hugging Face Hub, run `hf download {path} --local-dir DIR` and give DIR"
    return ""
