"""Refuse settings that cannot work, before anything starts: one sentence with the key, the value and the fix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from configs.layout import process_multiple
from configs.load import load_config, near
from configs.schema import Config
from megatron_ext.rl.advantages import compute_advantages, soft_overlong_penalty
from megatron_ext.rl.aggregation import AGGREGATIONS
from megatron_ext.rl.losses.kl import KL_TYPES
from megatron_ext.rl.schedules import build_controller
from megatron_ext.rl.selection import build_selection
from megatron_ext.rl.value import check_gae
from recipes.checks import fp8, rollout
from recipes.data.evalsets import check_sets, eval_paths
from recipes.data.sources import GENERATORS
from recipes.rewards.verifiers import VERIFIERS

PLACEHOLDER = re.compile(r"<(.+)>")  # a value that the user must give, as in model.path: <Qwen2.5-7B>


def load_checked(overrides: Sequence[str]) -> Config:
    """Compose a configuration from ``key=value`` words and check it. Raises ValueError in one sentence."""
    config = load_config(overrides)
    check(config)
    return config


def check(config: Config) -> None:
    """Refuse what cannot work, before anything starts."""
    _check_algorithm(config)
    _check_sizes(config)
    _check_layout(config)
    fp8.check_settings(config)
    rollout.check_settings(config)
    _check_files(config)


def _check_algorithm(c: Config) -> None:
    schedule = {key: value for key, value in c.schedule.items() if key != "name"}
    build_controller(c.loss["name"], c.loss, c.schedule["name"], **schedule)
    build_selection(**c.selection)
    if c.advantage.name == "gae":
        check_gae(c.advantage.params)
        if 0 < c.train.steps <= c.critic.warmup_steps:
            raise ValueError(f"critic.warmup_steps={c.critic.warmup_steps} must be below train.steps={c.train.steps}")
    else:
        if c.rollout.n == 1 and (c.advantage.name != "reinforce_pp" or c.advantage.params.get("baseline") == "group"):
            raise ValueError(
                f"rollout.n={c.rollout.n}: advantage.name={c.advantage.name} compares the responses of a prompt, so "
                "every advantage would be 0; set rollout.n to 2 or more, or advantage.name=reinforce_pp"
            )
        compute_advantages(c.advantage.name, torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), **c.advantage.params)
    _one_of("reference.kl_type", c.reference.kl_type, KL_TYPES)
    if c.reference.path is not None and not c.reference.kl_coef:
        raise ValueError(f"reference.path={c.reference.path} has no effect: set reference.kl_coef above 0 or unset it")
    _one_of("advantage.aggregation", c.advantage.aggregation, AGGREGATIONS)
    if c.optim.distributed and (c.optim.optimizer != "adam" or c.model.dtype == "float64"):
        raise ValueError(
            "optim.distributed=true works with optim.optimizer=adam in float32 or bfloat16, not with "
            f"{c.optim.optimizer} in {c.model.dtype}: set optim.distributed=false"
        )
    _one_of("reward.name", c.reward.name, tuple(VERIFIERS))
    if c.train.tis_cap is not None and not c.train.tis_cap > 0:
        raise ValueError(f"train.tis_cap={c.train.tis_cap} must be above 0; null switches the correction off")
    if c.advantage.overlong == "penalty":
        soft_overlong_penalty(
            torch.zeros(1),
            max_tokens=c.rollout.max_tokens,
            buffer=c.advantage.overlong_buffer,
            factor=c.advantage.overlong_factor,
        )
    if c.loss["name"] == "pg" and c.rollout.max_staleness and c.train.tis_cap is None:
        raise ValueError(
            f"rollout.max_staleness={c.rollout.max_staleness} with loss.name=pg: that loss has no importance ratio, so "
            "responses of older weights would count as new ones; set rollout.max_staleness=0, train.tis_cap=2, or "
            "another loss"
        )
    off_policy = c.rollout.temperature != 1.0 or c.rollout.top_p != 1.0
    if off_policy and c.train.tis_cap is None:
        raise ValueError(
            f"rollout.temperature={c.rollout.temperature}, rollout.top_p={c.rollout.top_p}: the learner's ratio would "
            "compare two distributions; set both to 1, or train.tis_cap=2 to correct for it"
        )


def _check_sizes(c: Config) -> None:
    for key in (
        "rollout.prompts_per_step",
        "rollout.n",
        "rollout.max_tokens",
        "train.mini_batch_prompts",
        "train.epochs",
    ):
        _at_least(c, key, 1)
    for key in ("train.micro_batch_tokens", "eval.problems", "eval.n", "rollout.num_servers", "train.threads"):
        _at_least(c, key, 1)
    for key in ("train.steps", "train.save_every", "eval.every", "train.loss_chunk_tokens", "optim.lr"):
        _at_least(c, key, 0)
    for key in ("critic.lr", "critic.clip_grad", "critic.warmup_steps", "reference.kl_coef", "train.positive_nll_coef"):
        _at_least(c, key, 0)
    if c.critic.clip_range is not None and not c.critic.clip_range > 0:
        raise ValueError(f"critic.clip_range={c.critic.clip_range} must be above 0; null switches clipping off")
    if c.rollout.prompts_per_step % min(c.train.mini_batch_prompts, c.rollout.prompts_per_step):
        raise ValueError(
            f"train.mini_batch_prompts={c.train.mini_batch_prompts} does not divide rollout.prompts_per_step="
            f"{c.rollout.prompts_per_step}: the last optimizer step of a batch would be a small one; choose a divisor"
        )
    for key, length in (("rollout.max_tokens", c.rollout.max_tokens), ("eval.max_tokens", c.eval.max_tokens or 0)):
        if length >= c.rollout.max_model_len:
            raise ValueError(
                f"{key}={length} leaves no room for a prompt in rollout.max_model_len={c.rollout.max_model_len}; "
                "raise rollout.max_model_len"
            )
    if c.run.peak_tflops is not None and not c.run.peak_tflops > 0:
        raise ValueError(f"run.peak_tflops={c.run.peak_tflops} must be above 0; null looks it up by the GPU's name")
    _check_refills(c)
    _check_evaluation(c)


def _check_evaluation(c: Config) -> None:
    if bad := [k for k in c.eval.k if not 1 <= k <= c.eval.n]:
        raise ValueError(f"eval.k={c.eval.k}: pass@{bad[0]} needs eval.n >= {bad[0]}, not {c.eval.n}")
    check_sets(c)


def _check_refills(c: Config) -> None:
    generated = c.rollout.generated_prompts
    if generated is not None and generated < c.rollout.prompts_per_step:
        raise ValueError(
            f"rollout.generated_prompts={generated} is below rollout.prompts_per_step={c.rollout.prompts_per_step}; "
            "raise it or leave it unset"
        )
    surplus = generated is not None and generated > c.rollout.prompts_per_step
    unused = {
        "rollout.generated_prompts": generated if surplus else 0,
        "advantage.max_refills": c.advantage.max_refills,
    }
    for key, value in unused.items():
        if value and not c.advantage.drop_uniform_groups:
            raise ValueError(f"{key}={value} has no effect: set advantage.drop_uniform_groups=true or unset it")


def _check_layout(c: Config) -> None:
    p = c.parallel
    for key in ("tp", "pp", "vpp", "cp", "ep"):
        _at_least(c, f"parallel.{key}", 1)
    size = process_multiple(p)
    if p.nproc is not None and (p.nproc < 1 or p.nproc % size):
        experts = "" if p.ep == 1 else " and ep x pp"
        raise ValueError(
            f"parallel.nproc={p.nproc} is not a multiple of tp x pp x cp{experts}, so of {size}; choose one"
        )
    if p.vpp > 1 and p.pp < 2:
        raise ValueError(f"parallel.vpp={p.vpp} needs pipeline parallelism: set parallel.pp >= 2 or parallel.vpp=1")
    if p.sp and p.tp < 2:
        raise ValueError("parallel.sp=true splits tokens over tensor-parallel ranks: set parallel.tp >= 2 or drop it")


def _check_files(c: Config) -> None:
    for key, what in (("model.path", "Hugging Face directory"), ("data.path", "JSONL file")):
        section, name = key.split(".")
        if missing := PLACEHOLDER.fullmatch(getattr(getattr(c, section), name) or ""):
            raise ValueError(f"{key}: give the {what} of {missing[1]}, as {key}=PATH")
    journals = ("journal.bin", "journal.jsonl")  # in this format, and in the one before it
    if c.rollout.replay is not None and not any((Path(c.rollout.replay) / name).is_file() for name in journals):
        raise ValueError(f"rollout.replay={c.rollout.replay}: no {journals[0]} there; give the directory of a run")
    generated = c.model.path in ("tiny", "smollm2")
    if not generated and not (Path(c.model.path) / "config.json").is_file():
        raise ValueError(
            f"model.path={c.model.path}: no config.json there; give a Hugging Face model directory, 'tiny' or 'smollm2'"
        )
    if c.reference.path is not None and not (Path(c.reference.path) / "config.json").is_file():
        raise ValueError(
            f"reference.path={c.reference.path}: no config.json there; give a Hugging Face model directory"
        )
    given = [("data.path", c.data.path), *(("data.eval_path", path) for path in eval_paths(c))]
    for key, path in given:
        if path is not None and not Path(path).exists():
            raise ValueError(
                f"{key}={path}: no such file; give JSONL or Parquet with problem and answer (docs/data.md)"
            )
    if c.data.path is None:
        _check_data_name(c.data.name)


def _check_data_name(name: str) -> None:
    """What generates problems by itself needs no file; ``owner/name`` is a data set of the hub."""
    if name in ("jsonl", "gsm8k"):
        raise ValueError(f"data.name={name} needs data.path=FILE.jsonl")
    if "/" not in name:
        _one_of("data.name", name, (*GENERATORS, "jsonl", "gsm8k"))


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key}={value} is unknown{near(value, list(allowed))}; choose {' | '.join(allowed)}")


def _at_least(config: Config, key: str, low: float) -> None:
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    if value < low:
        raise ValueError(f"{key}={value} must be at least {low}")
