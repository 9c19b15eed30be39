"""Settings that may change when a run continues in its directory.

A run directory belongs to one run. Every key is in one of four classes:

    free      where and how fast it runs: changed at will, not shown
    recorded  visible in the numbers, harmless to what is learned: changed at will, shown in the run's history
    asked     what is learned, and from what: only with resume.allow_changes=true, shown in the run's history
    frozen    which model, problems and batches: refused, since the journal and the checkpoints would not fit

A key that is not listed is "asked", so that a new key cannot change a run unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import conversion
from configs.load import load_saved_config
from configs.schema import Config

FREE = """
run resume logging tracking model.cache_dir model.recompute model.recompute_modules train.save_every
train.keep_checkpoints optim.overlap_grad_reduce optim.overlap_param_gather optim.bucket_parameters
train.stop_after_silent_steps train.async_save train.threads train.loss_chunk_tokens optim.offload reward.workers
reward.memory_mb rollout.num_servers rollout.urls rollout.weight_sync rollout.sync_dir rollout.colocated
rollout.gpu_memory_utilization rollout.server_gpus rollout.extra_args rollout.max_num_seqs rollout.timeout_s
rollout.update_timeout_s rollout.start_timeout_s rollout.probe_s rollout.revive_timeout_s train.keep_logits_gib
"""
RECORDED = """
eval parallel train.nonfinite train.nonfinite_in_a_row train.steps train.micro_batch_tokens train.entropy_probe_every
model.transformer_impl model.moe_permute_fusion model.batch_invariant rollout.batch_invariant rollout.engine
rollout.dtype rollout.in_flight rollout.replay rollout.agreement_limit reward.timeout_s
"""
FROZEN = """
seed model.path model.dtype model.warm_start data rollout.prompts_per_step rollout.n train.mini_batch_prompts
train.epochs
"""
CLASSES = {
    key: name for name, keys in {"free": FREE, "recorded": RECORDED, "frozen": FROZEN}.items() for key in keys.split()
}
Changes = dict[str, tuple[Any, Any]]  # dotted key -> value before, value now


def class_of(key: str) -> str:
    """``free``, ``recorded``, ``asked`` or ``frozen``, by the longest part of the key that is listed."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if (found := CLASSES.get(".".join(parts[:end]))) is not None:
            return found
    return "asked"


def differences(old: Config, new: Config) -> Changes:
    """All keys whose values differ; a parameter that only one side has is None on the other."""
    before, now = _flat(asdict(old)), _flat(asdict(new))
    keys = list(dict.fromkeys([*before, *now]))
    return {key: (before.get(key), now.get(key)) for key in keys if not _same(before.get(key), now.get(key))}


def _same(a: Any, b: Any) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or (a == b and isinstance(a, bool) == isinstance(b, bool))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_changes(changes: Changes, config: Config, *, begun: bool) -> Changes:
    """The changes that the run's history must show.

    Args:
        begun: rollouts or a checkpoint exist. Before that nothing was learned from the old settings.

    Raises:
        ValueError: a frozen key changed, or one that is asked for without ``resume.allow_changes=true``.
    """
    by_class: dict[str, list[str]] = {}
    for key in changes:
        by_class.setdefault(class_of(key), []).append(key)
    if frozen := by_class.get("frozen"):
        before, now = changes[frozen[0]]
        raise ValueError(
            f"run.dir={config.run.dir} holds a run with {frozen[0]}={before}, not {now}; set run.dir to a new "
            "directory, or go back to the old value to continue that run"
        )
    asked = by_class.get("asked", [])
    if asked and begun and not config.resume.allow_changes:
        listed = ", ".join(f"{key}={changes[key][0]} (now {changes[key][1]})" for key in asked[:4])
        more = f" and {len(asked) - 4} more" if len(asked) > 4 else ""
        raise ValueError(
            f"run.dir={config.run.dir} holds a run with {listed}{more}: go back to the old value, set "
            "resume.allow_changes=true to continue with the new one (the change is recorded), or set run.dir to a new "
            "directory"
        )
    return {key: pair for key, pair in changes.items() if class_of(key) != "free"}


def shown(changes: Mapping[str, Any]) -> str:
    """Changes as one line for people."""
    return ", ".join(f"{key} {before} → {now}" for key, (before, now) in changes.items())


def check_replay(config: Config) -> None:
    """Raises ValueError when a journal was recorded in other batches, or with a model of another kind."""
    if config.rollout.replay is None:
        return
    saved = Path(config.rollout.replay) / "config.yaml"
    if not saved.is_file():
        return
    old, where = load_saved_config(saved), f"rollout.replay={config.rollout.replay} was recorded with"
    for key in ("prompts_per_step", "n"):
        before, now = getattr(old.rollout, key), getattr(config.rollout, key)
        if before != now:
            raise ValueError(f"{where} rollout.{key}={before}, not {now}: set rollout.{key}={before}")
    theirs, ours = Path(old.model.path), Path(config.model.path)
    if theirs != ours and (theirs / "config.json").is_file() and (ours / "config.json").is_file():
        a, b = conversion.read_config(theirs), conversion.read_config(ours)
        if (a.architecture, a.vocab_size) != (b.architecture, b.vocab_size):
            raise ValueError(
                f"{where} model.path={theirs} ({a.architecture}, {a.vocab_size} tokens), not {ours} "
                f"({b.architecture}, {b.vocab_size} tokens): replay it with a copy of its own model"
            )
    elif {str(theirs), str(ours)} & {"tiny", "smollm2"} and str(theirs) != str(ours):
        raise ValueError(f"{where} model.path={theirs}, not {ours}: replay it with a copy of its own model")
