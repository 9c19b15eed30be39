"""Save and resume with Megatron's `dist_checkpointing`: any layout writes it, any layout reads it.

A checkpoint directory appears complete or not at all. It is written under a temporary name, synced, described by a
manifest of checksums and renamed; then the pointer file `latest` is updated. Megatron's format contains pickles, so no
file is opened before the manifest is verified.

Every rank writes, hashes and reads its own share: data-parallel ranks divide the weights among themselves
(Megatron's "fully parallel" strategies), and the optimizer's state is never gathered (`optimizer_pieces`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.utils import unwrap_model

from conversion.hf_files import copy_side_files
from conversion.megatron_reader import HF_FILES
from conversion.publish import (
    MANIFEST,
    ManifestError,
    check_file,
    check_manifest,
    published,
    working_directory,
    write_manifest,
)
from megatron_ext.learner import control
from megatron_ext.learner.checkpoint_files import PlannedFile, SaveStrategy, Staging, collect_reports, report
from megatron_ext.learner.critic import Critic
from megatron_ext.learner.finite import SUFFIX, check_finite
from megatron_ext.learner.learner import Learner, Trainable
from megatron_ext.learner.model import on_device
from megatron_ext.learner.optimizer_pieces import use_pieces

# The format of the distributed optimizer's state that any layout can read back.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,  # else the names would say whether experts are spread over ranks
}
LATEST = "latest"
STATE = "state.json"
EXTRA_STATE = "._extra_state"  # in the names of Transformer Engine's state besides parameters; a number may follow
CRITIC = "critic"  # directory inside a checkpoint, in the same format


class Saver:
    """Writes the checkpoints of a run, one at a time."""

    def __init__(self, root: Path, *, keep: int = 0, background: bool = False) -> None:
        """
        Args:
            root: where checkpoints ``step_N`` and the pointer ``latest`` are, on a file system that all ranks share.
            keep: all but the newest so many checkpoints are removed after each save; 0 keeps all.
            background: `save` returns once this rank has copied its part to host memory, and training continues while
                the copy is written. It needs host memory for this rank's share of weights and optimizer state.
        """
        self._root, self._keep = root, keep
        self._background = background
        self._staging = {name: Staging() for name in ("", CRITIC)} if background else {}  # by directory
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._began = 0.0
        self.seconds: float | None = None  # from the call of `save` to the end of this rank's part, of the last one

    @property
    def staged_bytes(self) -> int:
        """Host memory that background saving holds on this rank."""
        return sum(staging.nbytes for staging in self._staging.values())

    def save(self, learner: Learner, step: int, state: dict[str, Any], *, critic: Critic | None = None) -> Path:
        """Write ``root/step_N`` with weights, optimizer, learning-rate schedule and ``state`` (JSON). A collective.

        The critic's are in a directory of their own, so that the policy reads and exports without it. In the
        background, waits for the previous checkpoint first, and raises what went wrong with it.
        """
        self.wait()
        self._began = time.monotonic()
        directory, rank, world = self._root / f"step_{step:06d}", dist.get_rank(), dist.get_world_size()
        with contextlib.ExitStack() as stack:
            temporary = working_directory(directory)
            if rank == 0:
                temporary = stack.enter_context(published(directory, overwrite=True))
                if critic is not None:
                    (temporary / CRITIC).mkdir()
            control.barrier()
            if not temporary.is_dir():
                raise ValueError(
                    f"rank {rank} does not see {temporary}, which rank 0 made: put run.dir on a file system that all "
                    "nodes share"
                )
            models = {"": learner} if critic is None else {"": learner, CRITIC: critic}
            planned: list[PlannedFile] = []
            written: list[dict[str, Any]] = []
            for name, model in models.items():
                planned.append(_plan(model, temporary / name, self._staging.get(name)))
                if not self._background:
                    written.append(planned[-1].write())
                model.rest()
            about = {
                "kind": "megatron-gppo checkpoint",
                "step": step,
                "settings": _settings(learner),
                "fp8_scales": _has_scales(learner),
            }
            content = json.dumps({"step": step, **state}, indent=1) + "\n"
            finish = partial(self._finish, stack.pop_all(), directory, planned, learner.model_dir, content, about)
        if not self._background:
            finish(written, rank, world)
            control.barrier()
        else:
            self._thread = threading.Thread(target=self._in_background, args=(finish, rank, world), daemon=True)
            self._thread.start()
        return directory

    def report(self) -> dict[str, float]:
        """In the background: seconds from the call to the published checkpoint, once, and host memory. No collective.

        Raises an error of this rank's background save.
        """
        self._raise()
        if not self._background or self.seconds is None:
            return {}
        seconds, self.seconds = self.seconds, None
        return {"timing_s/checkpoint": seconds, "perf/checkpoint_host_gib": self.staged_bytes / 2**30}

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until the checkpoint that is being written, if any, is published. A collective."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self._raise()
        control.barrier()  # rank 0 publishes

    def _in_background(self, finish: Any, rank: int, world: int) -> None:
        try:
            finish(None, rank, world)
        except BaseException as error:
            self._error = error

    def _finish(
        self,
        stack: contextlib.ExitStack,
        directory: Path,
        planned: list[PlannedFile],
        model_dir: Path,
        state: str,
        about: dict[str, Any],
        written: list[dict[str, Any]] | None,
        rank: int,
        world: int,
    ) -> None:
        """Write this rank's files if that is still to do; rank 0 then publishes. No collective."""
        temporary = working_directory(directory)
        with stack:
            try:
                parts = [file.write() for file in planned] if written is None else written
            except BaseException as error:
                with contextlib.suppress(OSError):  # rank 0 may have failed too and be gone with the directory
                    report(temporary, rank, {"error": f"{type(error).__name__}: {error}"})
                raise
            report(temporary, rank, {"parts": parts})
            if rank == 0:
                reports = [content["parts"] for content in collect_reports(temporary, world)]
                segments: dict[str, dict[int, str]] = {}
                for file, parts_of_ranks in zip(planned, zip(*reports, strict=True), strict=True):
                    where = file.directory.relative_to(temporary)
                    found = file.finish(list(parts_of_ranks))
                    segments |= {(where / name).as_posix(): starts for name, starts in found.items()}
                copy_side_files(model_dir, temporary / HF_FILES)  # so that the checkpoint can be exported by itself
                (temporary / STATE).write_text(state, encoding="utf-8")
                write_manifest(temporary, segments=segments, **about)
        if rank == 0:
            point_to(self._root, directory.name)
            others = [path for path in by_write_order(self._root) if path.name != directory.name]
            for old in others[: len(others) + 1 - self._keep] if self._keep else []:
                shutil.rmtree(old)
        self.seconds = time.monotonic() - self._began


def save(
    learner: Learner, root: Path, step: int, state: dict[str, Any], *, keep: int = 0, critic: Critic | None = None
) -> Path:
    """One checkpoint, complete on return. See :class:`Saver`."""
    return Saver(root, keep=keep).save(learner, step, state, critic=critic)


def find_latest(root: Path) -> Path | None:
    """The newest complete checkpoint, or None when there is none.

    Raises ValueError if the pointer names a missing directory: a silent new start would lose the run.
    """
    pointer = root / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"step_\d+", name) or not (root / name).is_dir():
        raise ValueError(f"{pointer} names {name[:80]!r}, which is not a checkpoint there")
    return root / name


def load(learner: Learner, directory: Path, *, critic: Critic | None = None) -> dict[str, Any]:
    """Restore everything that :func:`save` wrote, in any layout; returns ``state`` with its ``step``. A collective.

    Raises ManifestError (a ValueError) when a file is missing, differs from the manifest or holds a number that is not
    finite, and ValueError when the optimizer or the precision is another one, or there is a critic on one side only;
    nothing is restored then.
    """
    manifest = verified_manifest(directory)
    for key, value in _settings(learner).items():
        if (saved := manifest.get("settings", {}).get(key)) != value:
            raise ValueError(f"{directory} was written with {key}={saved}, not {value}: set it back to continue")
    if (saved_critic := (directory / CRITIC).is_dir()) != (critic is not None):
        raise ValueError(
            f"{directory} was written {'with' if saved_critic else 'without'} a critic: "
            f"{'set' if saved_critic else 'do not set'} advantage.name=gae to continue"
        )
    scales = bool(manifest.get("fp8_scales"))
    _restore(learner, directory, scales)
    if critic is not None:
        _restore(critic, directory / CRITIC, scales)
    state: dict[str, Any] = json.loads((directory / STATE).read_text(encoding="utf-8"))
    return state


def verified_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, after a check that all bytes match it and all numbers are finite.

    Ranks divide the large files, and all raise the same error.

    Raises ManifestError.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    error, manifest = "", None
    try:
        manifest = check_manifest(directory, contents=False)  # sizes, and whatever is not plain tensors
        if manifest is None:
            raise ManifestError(f"{directory} has no manifest: it is not a checkpoint of this project")
        files = sorted(manifest["files"].items(), key=lambda item: (-item[1]["size"], item[0]))
        for name, entry in files[rank::world]:
            check_file(directory / name, entry)
            if name.endswith(SUFFIX):
                check_finite(directory, name, manifest)
    except ManifestError as problem:
        error = str(problem)
    # Reading takes as long as it takes: ranks wait on the CPU.
    failed = torch.tensor([rank if error else world])
    if world > 1:
        dist.all_reduce(failed, op=dist.ReduceOp.MIN, group=control.group())
    if int(failed) < world:
        raise ManifestError(control.broadcast_bytes(error.encode(), src=int(failed)).decode())
    assert manifest is not None
    return manifest


def _plan(model: Trainable, directory: Path, staging: Staging | None) -> PlannedFile:
    """This rank's part of ``model``, copied to the host if there is ``staging``. A collective."""
    model.reload(optimizer=True)
    _start(model.optimizer)
    strategy = SaveStrategy(staging)
    with on_device():
        state = _sharded_state(model, is_loading=False, scales=_has_scales(model))
        dist_checkpointing.save(state, str(directory), FullyParallelSaveStrategyWrapper(strategy, _replicas()))
    assert strategy.planned is not None
    return strategy.planned


def _replicas() -> Any:
    """The ranks with the same weights, which divide saving and loading among themselves."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _restore(model: Trainable, directory: Path, saved_scales: bool) -> None:
    model.reload(optimizer=True)
    if model.config.optim.distributed:
        _start(model.optimizer)  # the loaded state is written directly into it
    scales = saved_scales and _has_scales(model)
    with on_device():
        wanted = _sharded_state(model, is_loading=True, scales=scales)
        _, settings = extract_matching_values(
            wanted["optimizer"], lambda value: isinstance(value, (ShardedBase, LocalNonpersistentObject))
        )
        strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), _replicas())
        loaded = dist_checkpointing.load(wanted, str(directory), strategy)
        for key, chunk in _chunks(model).items():
            load_weights(chunk, loaded[key])
        loaded["optimizer"] = _fit_parts(model.optimizer, loaded["optimizer"], settings)
        _fit_steps(model.optimizer, loaded["optimizer"])
        model.optimizer.load_state_dict(loaded["optimizer"])
        model.lr_schedule.num_steps = 0  # Megatron adds the loaded count to what is there
        model.lr_schedule.load_state_dict(loaded["lr_schedule"])
    _unshare_steps(model.optimizer)
    model.rest()


def load_weights(chunk: torch.nn.Module, state: dict[str, Any]) -> None:
    """`load_state_dict` that allows only extra states to be missing. ValueError names missing or unknown tensors."""
    missing, unexpected = chunk.load_state_dict(state, strict=False)
    if wrong := [key for key in (*missing, *unexpected) if EXTRA_STATE not in key]:
        raise ValueError(f"the checkpoint does not fit the model: {len(wrong)} tensors missing or unknown, {wrong[:3]}")


def _has_scales(model: Trainable) -> bool:
    """Whether training depends on Transformer Engine's extra states.

    Only delayed scaling depends on earlier batches. All other extra states are empty or repeat the settings. They are
    not saved, so a checkpoint fits Megatron's own layers, Transformer Engine's, and FP8.
    """
    return model.config.model.fp8 is not None and model.config.model.fp8_recipe == "delayed"


def _settings(learner: Learner) -> dict[str, Any]:
    """The settings that determine the tensors of a checkpoint. The layout is not one of them."""
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
    """Create the optimizer state of every parameter, as the first update would, so that a checkpoint can hold it.

    During the critic's warm-up the policy has no state yet. Existing state is kept.
    """
    for part in _parts(optimizer):
        if part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)
        if _is_torch_adam(part):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def _fit_parts(optimizer: Any, loaded: dict[Any, Any], settings: dict[Any, Any]) -> dict[Any, Any]:
    """The loaded state, with as many parts as this optimizer.

    Experts that are distributed over ranks have a separate optimizer, others share one with the dense weights, and a
    checkpoint may come from the other kind of layout. Tensors were found by their names. Of the rest, only the step
    count comes from the checkpoint; ``settings`` are this run's.
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
    """Remove and return the step count from where either kind of Adam stores it."""
    return int(
        saved.get("state", {}).pop("common_step", 0) or max(g.pop("step", None) or 0 for g in saved["param_groups"])
    )


def _fit_steps(optimizer: Any, loaded: dict[Any, Any]) -> None:
    """Convert the step count, and settings that only one Adam has, to the form of this optimizer.

    torch's Adam counts steps per parameter, which Megatron's ordinary optimizers save as one ``common_step`` (and omit
    if it is 0). Transformer Engine's and apex's count whole numbers per group. A run may continue with the other kind.
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
    model.settle()
    for name, chunk in _chunks(model).items():
        tensors = chunk.sharded_state_dict()
        state[name] = {key: value for key, value in tensors.items() if scales or EXTRA_STATE not in key}
    use_pieces(model.optimizer)
    state["optimizer"] = model.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=_METADATA)
    state["lr_schedule"] = model.lr_schedule.state_dict()
    return state


def by_write_order(root: Path) -> list[Path]:
    """All checkpoints of a run, the oldest first: by when they were written, which is not always the order of steps."""

    def written(path: Path) -> tuple[int, str]:
        manifest = path / MANIFEST
        return (manifest if manifest.is_file() else path).stat().st_mtime_ns, path.name

    return sorted(root.glob("step_*[0-9]"), key=written)


def point_to(root: Path, name: str) -> None:
    """Point `latest` to this checkpoint."""
    _write_atomically(root / LATEST, name + "\n")


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
