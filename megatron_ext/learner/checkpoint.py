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
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.utils import unwrap_model

from conversion.hf_files import side_files
from conversion.megatron_reader import HF_FILES, stored_cuts
from conversion.publish import ManifestError, check_manifest, published, working_directory, write_manifest
from megatron_ext.learner import control
from megatron_ext.learner.critic import Critic
from megatron_ext.learner.learner import Learner, Trainable
from megatron_ext.learner.model import on_device

# We save synchronously, so results of the writers are collected in this process. Megatron would make a manager process
# for them, which imports the whole program again (3 s of CPU, as much memory) and outlives a killed trainer.
filesystem_async._results_queue = queue.Queue()
# The format of the distributed optimizer's state that any layout can read back.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,  # else the names would say whether experts are spread over ranks
}
LATEST = "latest"
STATE = "state.json"
EXTRA_STATE = "._extra_state"  # in the names of what Transformer Engine keeps beside parameters; a number may follow
CRITIC = "critic"  # directory inside a checkpoint, in the same format


def save(
    learner: Learner, root: Path, step: int, state: dict[str, Any], *, keep: int = 0, critic: Critic | None = None
) -> Path:
    """Write ``root/step_N`` with weights, optimizer, learning-rate schedule and ``state`` (JSON). A collective.

    The critic's are in a directory of their own, so that the policy reads and exports without it. ``keep`` > 0 removes
    all but the newest so many checkpoints afterwards.
    """
    directory = root / f"step_{step:06d}"
    first = torch.distributed.get_rank() == 0
    with (
        published(directory, overwrite=True)
        if first
        else contextlib.nullcontext(working_directory(directory)) as partial
    ):
        if first and critic is not None:
            (partial / CRITIC).mkdir()
        control.barrier()
        _write(learner, partial)
        if critic is not None:
            _write(critic, partial / CRITIC)
        control.barrier()
        if first:
            (partial / HF_FILES).mkdir()
            for file in side_files(learner.model_dir):  # so that the checkpoint can be exported by itself
                shutil.copyfile(file, partial / HF_FILES / file.name)
            (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=1) + "\n", encoding="utf-8")
            settings, scales = _settings(learner), _has_scales(learner)
            facts: dict[str, Any] = {"step": step, "settings": settings, "fp8_scales": scales}
            write_manifest(partial, cuts=stored_cuts(partial), kind="megatron-gppo checkpoint", **facts)
    if first:
        _write_atomically(root / LATEST, directory.name + "\n")
        for old in sorted(root.glob("step_*[0-9]"))[:-keep] if keep else []:
            shutil.rmtree(old)
    control.barrier()
    return directory


def find_latest(root: Path) -> Path | None:
    """The newest complete checkpoint, or None when there is none.

    Raises ValueError when the pointer names a directory that is not there: silently starting over would lose a run.
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


def load(learner: Learner, directory: Path, *, critic: Critic | None = None) -> dict[str, Any]:
    """Restore everything :func:`save` wrote, in the present layout; returns ``state`` with its ``step``. A collective.

    Raises ManifestError (a ValueError) when a file is missing or differs from the manifest, and ValueError when the
    optimizer or the precision is another one, or there is a critic on one side only; nothing is read then.
    """
    manifest = check_manifest(directory, contents=torch.distributed.get_rank() == 0)
    if manifest is None:
        raise ManifestError(f"{directory} has no manifest: it is not a checkpoint of this project")
    for key, value in _settings(learner).items():
        if (saved := manifest.get("settings", {}).get(key)) != value:
            raise ValueError(f"{directory} was written with {key}={saved}, not {value}: set it back to continue")
    if (saved_critic := (directory / CRITIC).is_dir()) != (critic is not None):
        raise ValueError(
            f"{directory} was written {'with' if saved_critic else 'without'} a critic: "
            f"{'set' if saved_critic else 'do not set'} advantage.name=gae to continue"
        )
    control.barrier()
    scales = bool(manifest.get("fp8_scales"))
    _restore(learner, directory, scales)
    if critic is not None:
        _restore(critic, directory / CRITIC, scales)
    state: dict[str, Any] = json.loads((directory / STATE).read_text(encoding="utf-8"))
    return state


def _write(model: Trainable, directory: Path) -> None:
    model.reload(optimizer=True)
    _start(model.optimizer)
    with on_device():
        state = _sharded_state(model, is_loading=False, scales=_has_scales(model))
        dist_checkpointing.save(state, str(directory))
    model.rest()


def _restore(model: Trainable, directory: Path, saved_scales: bool) -> None:
    model.reload(optimizer=True)
    if model.config.optim.distributed:
        _prepare_torch_adam(model.optimizer)
    scales = saved_scales and _has_scales(model)
    with on_device():
        wanted = _sharded_state(model, is_loading=True, scales=scales)
        _, settings = extract_matching_values(
            wanted["optimizer"], lambda value: isinstance(value, (ShardedBase, LocalNonpersistentObject))
        )
        loaded = dist_checkpointing.load(wanted, str(directory))
        for key, chunk in _chunks(model).items():
            load_weights(chunk, loaded[key])
        loaded["optimizer"] = _fit_parts(model.optimizer, loaded["optimizer"], settings)
        _fit_steps(model.optimizer, loaded["optimizer"])
        model.optimizer.load_state_dict(loaded["optimizer"])
        model.lr_schedule.load_state_dict(loaded["lr_schedule"])
    _unshare_steps(model.optimizer)
    model.rest()


def load_weights(chunk: torch.nn.Module, state: dict[str, Any]) -> None:
    """`load_state_dict` that may lack extra states, but nothing else. ValueError names what is missing or unknown."""
    missing, unexpected = chunk.load_state_dict(state, strict=False)
    if wrong := [key for key in (*missing, *unexpected) if EXTRA_STATE not in key]:
        raise ValueError(f"the checkpoint does not fit the model: {len(wrong)} tensors missing or unknown, {wrong[:3]}")


def _has_scales(model: Trainable) -> bool:
    """Whether Transformer Engine's extra states hold anything that training depends on.

    Only delayed scaling has a memory. Every other extra state is empty or repeats the settings, and is left out of a
    checkpoint: so the same checkpoint fits Megatron's own layers, Transformer Engine's, and FP8.
    """
    return model.config.model.fp8 is not None and model.config.model.fp8_recipe == "delayed"


def _settings(learner: Learner) -> dict[str, Any]:
    """What decides which tensors a checkpoint holds. The layout is not in it: any fits any."""
    config = learner.config
    return {
        "model.dtype": config.model.dtype,
        "optim.optimizer": config.optim.optimizer,
        "optim.distributed": config.optim.distributed,
    }


def _parts(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _is_torch_adam(part: Any) -> bool:
    return isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _start(optimizer: Any) -> None:
    """Give every parameter the state that the first update would: a checkpoint must hold it even before that.

    A policy has none yet while its critic warms up. State that is there stays.
    """
    for part in _parts(optimizer):
        if part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)
        if _is_torch_adam(part):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def _prepare_torch_adam(optimizer: Any) -> None:
    """Make a fresh distributed optimizer around torch's Adam loadable.

    Only apex and Transformer Engine count steps per group; torch counts per parameter. Megatron reads that count before
    loading, when it is not there yet, and later expects it among the saved tensors, where it never was (it restores
    the count from the parameter groups).
    """
    _start(optimizer)
    for part in filter(_is_torch_adam, _parts(optimizer)):
        part._set_main_param_and_optimizer_states = partial(_set_states_keeping_step, part)


def _fit_parts(optimizer: Any, loaded: dict[Any, Any], settings: dict[Any, Any]) -> dict[Any, Any]:
    """What was loaded, with as many parts as this optimizer.

    Experts that are spread over ranks have an optimizer of their own, others share one with the dense weights, and a
    checkpoint may come from the other kind of layout. Tensors were found by their names; all the rest, ``settings``, is
    then this run's, and only the step count is the checkpoint's.
    """
    parts = len(_parts(optimizer))
    numbered = {key: value for key, value in loaded.items() if isinstance(key, int)}
    # Parts that are not the checkpoint's have parameter groups too, but nothing in them.
    saved = [
        part
        for part in (loaded, *numbered.values())
        if any("lr" in group for group in part.get("optimizer", part).get("param_groups", ()))
    ]
    if len(saved) == parts:
        return loaded
    step = max(_saved_step(part.get("optimizer", part)) for part in saved)
    own = (
        {key: numbered[key] for key in range(parts)} if parts > 1 else {k: loaded[k] for k in loaded.keys() - numbered}
    )
    merge(own, settings)
    for part in own.values() if parts > 1 else [own]:
        for group in part.get("optimizer", part)["param_groups"]:
            group["step"] = step
    return own


def _saved_step(saved: dict[str, Any]) -> int:
    """Taken out of where either kind of Adam has put it."""
    return int(
        saved.get("state", {}).pop("common_step", 0) or max(g.pop("step", None) or 0 for g in saved["param_groups"])
    )


def _fit_steps(optimizer: Any, loaded: dict[Any, Any]) -> None:
    """Bring the step count, and settings that one Adam has and the other lacks, to where this optimizer looks.

    torch's Adam counts steps per parameter, which Megatron's ordinary optimizers save as one ``common_step`` (and leave
    out when it is 0); Transformer Engine's and apex's count whole numbers per group. A run may go on with the other.
    """
    parts = _parts(optimizer)
    for part, saved in zip(parts, [loaded] if len(parts) == 1 else loaded.values(), strict=True):
        if part.config.optimizer != "adam":
            continue
        saved = saved.get("optimizer", saved)
        groups, states, step = saved["param_groups"], saved.get("state", {}), _saved_step(saved)
        per_parameter = _is_torch_adam(part) and not part.config.use_distributed_optimizer
        if per_parameter:
            states["common_step"] = torch.tensor(float(step))
        for group in groups:
            for key, value in {**part.optimizer.defaults, **({} if per_parameter else {"step": step})}.items():
                group.setdefault(key, value)


def _set_states_keeping_step(part: Any, parameter: Any, tensors: dict[str, Any]) -> None:
    step = part._get_main_param_and_optimizer_states(parameter)["step"].clone()
    type(part)._set_main_param_and_optimizer_states(part, parameter, {"step": step, **tensors})


def _unshare_steps(optimizer: Any) -> None:
    """Megatron restores one step tensor for all parameters; torch's Adam would then count it up once per parameter."""
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def _chunks(model: Trainable) -> dict[str, Any]:
    chunks = unwrap_model(model.chunks)
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": chunk for i, chunk in enumerate(chunks)}


def _sharded_state(model: Trainable, *, is_loading: bool, scales: bool) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, chunk in _chunks(model).items():
        tensors = chunk.sharded_state_dict()
        state[name] = {key: value for key, value in tensors.items() if scales or EXTRA_STATE not in key}
    state["optimizer"] = model.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=_METADATA)
    state["lr_schedule"] = model.lr_schedule.state_dict()
    return state


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
