"""Save and resume with Megatron's `dist_checkpointing`: any layout writes it, any layout reads it.

A checkpoint directory appears complete or not at all: it is written under a temporary name, synced, described by a
manifest of SHA-256 checksums and renamed; only then does the pointer file `latest` name it. Megatron's format contains
pickles, so nothing of it is opened before the manifest verifies.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.utils import unwrap_model

from conversion.hf_files import side_files
from conversion.megatron_reader import HF_FILES
from conversion.publish import ManifestError, check_manifest, published, write_manifest
from megatron_ext.learner.learner import Learner
from megatron_ext.learner.model import on_device

# We save synchronously, so results of the writers are collected in this process. Megatron would make a manager process
# for them, which imports the whole program again (3 s of CPU, as much memory) and outlives a killed trainer.
filesystem_async._results_queue = queue.Queue()
# The format of the distributed optimizer's state that any layout can read back.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}
LATEST = "latest"
STATE = "state.json"


def save(learner: Learner, root: Path, step: int, state: dict[str, Any], *, keep: int = 0) -> Path:
    """Write ``root/step_N`` with weights, optimizer, learning-rate schedule and ``state`` (JSON). A collective.

    ``keep`` > 0 removes all but the newest so many checkpoints afterwards.
    """
    directory = root / f"step_{step:06d}"
    first = torch.distributed.get_rank() == 0
    with published(directory, overwrite=True) if first else contextlib.nullcontext(_partial(directory)) as partial:
        torch.distributed.barrier()
        with on_device():
            dist_checkpointing.save(_sharded_state(learner, is_loading=False), str(partial))
        torch.distributed.barrier()
        if first:
            (partial / HF_FILES).mkdir()
            for file in side_files(learner.model_dir):  # so that the checkpoint can be exported by itself
                shutil.copyfile(file, partial / HF_FILES / file.name)
            (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=1) + "\n", encoding="utf-8")
            write_manifest(partial, kind="megatron-gppo checkpoint", step=step, settings=_settings(learner))
    if first:
        _write_atomically(root / LATEST, directory.name + "\n")
        for old in sorted(root.glob("step_*[0-9]"))[:-keep] if keep else []:
            shutil.rmtree(old)
    torch.distributed.barrier()
    return directory


def find_latest(root: Path) -> Path | None:
    """The newest complete checkpoint, or None when there is none.

    Raises ValueError when the pointer names a directory that is not there: starting over in silence would lose a run.
    """
    pointer = root / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"step_\d+", name) or not (root / name).is_dir():
        raise ValueError(
            f"{pointer} names {name!r}, which is not a checkpoint there: restore it, write the name of another one "
            "into the file, or delete the file to start from the beginning"
        )
    return root / name


def load(learner: Learner, directory: Path) -> dict[str, Any]:
    """Restore everything :func:`save` wrote, in the present layout; returns ``state`` with its ``step``. A collective.

    Raises ManifestError (a ValueError) when a file is missing or differs from the manifest, and ValueError when the
    optimizer or the precision is another one; nothing is read then.
    """
    manifest = check_manifest(directory, contents=torch.distributed.get_rank() == 0)
    if manifest is None:
        raise ManifestError(f"{directory} has no manifest: it is not a checkpoint of this project")
    for key, value in _settings(learner).items():
        if (saved := manifest.get("settings", {}).get(key)) != value:
            raise ValueError(f"{directory} was written with {key}={saved}, not {value}: set it back to continue")
    torch.distributed.barrier()
    if learner.config.optim.distributed:
        _prepare_torch_adam(learner.optimizer)
    with on_device():
        loaded = dist_checkpointing.load(_sharded_state(learner, is_loading=True), str(directory))
        for key, chunk in _chunks(learner).items():
            chunk.load_state_dict(loaded[key], strict=True)
        learner.optimizer.load_state_dict(loaded["optimizer"])
        learner.lr_schedule.load_state_dict(loaded["lr_schedule"])
    _unshare_steps(learner.optimizer)
    state: dict[str, Any] = json.loads((directory / STATE).read_text(encoding="utf-8"))
    return state


def _settings(learner: Learner) -> dict[str, Any]:
    """What decides which tensors a checkpoint holds. The layout is not in it: any fits any."""
    config = learner.config
    return {
        "model.dtype": config.model.dtype,
        "optim.optimizer": config.optim.optimizer,
        "optim.distributed": config.optim.distributed,
    }


def _prepare_torch_adam(optimizer: Any) -> None:
    """Make a fresh distributed optimizer around torch's Adam loadable.

    Only apex and Transformer Engine count steps per group; torch counts per parameter. Megatron reads that count before
    loading, when it is not there yet, and later expects it among the saved tensors, where it never was (it restores
    the count from the parameter groups).
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            part.init_state_fn(part.optimizer, part.config)
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))
            part._set_main_param_and_optimizer_states = partial(_set_states_keeping_step, part)


def _set_states_keeping_step(part: Any, parameter: Any, tensors: dict[str, Any]) -> None:
    step = part._get_main_param_and_optimizer_states(parameter)["step"].clone()
    type(part)._set_main_param_and_optimizer_states(part, parameter, {"step": step, **tensors})


def _unshare_steps(optimizer: Any) -> None:
    """Megatron restores one step tensor for all parameters; torch's Adam would then count it up once per parameter."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def _chunks(learner: Learner) -> dict[str, Any]:
    chunks = unwrap_model(learner.chunks)
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": chunk for i, chunk in enumerate(chunks)}


def _sharded_state(learner: Learner, *, is_loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {key: chunk.sharded_state_dict() for key, chunk in _chunks(learner).items()}
    state["optimizer"] = learner.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=_METADATA)
    state["lr_schedule"] = learner.lr_schedule.state_dict()
    return state


def _partial(directory: Path) -> Path:
    return directory.with_name(directory.name + ".partial")


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
