"""Refuse settings that cannot work, before anything starts: one sentence with the key, the value and the fix."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from configs.layout import process_multiple
from configs.load import load_config, near
from configs.schema import Config
from megatron_ext.rl.advantages import compute_advantages, soft_overlong_penalty
from megatron_ext.rl.schedules import build_controller
from megatron_ext.rl.selection import build_selection
from megatron_ext.rl.value import check_gae
from recipes.checks import fp8, ranges, rollout
from recipes.checks.keys import NAMES
from recipes.data.evalsets import check_sets, eval_paths
from recipes.data.sources import GENERATORS
from recipes.rewards.terms import check_reward

MOST_RESPONSES = 1_000_000  # of one rollout step
PLACEHOLDER = re.compile(r"<(.+)>")  # a value that the user must set, as in model.path: <Qwen2.5-7B>


def load_checked(overrides: Sequence[str]) -> Config:
    """Compose a configuration from ``key=value`` words and check it. Raises ValueError in one sentence."""
    config = load_config(overrides)
    check(config)
    return config


def check(config: Config, *, data: bool = True) -> None:
    """Refuse settings that cannot work, before anything starts. ``data``: whether the problems must already exist."""
    ranges.check(config)
    _check_algorithm(config)
    _check_sizes(config)
    _check_layout(config)
    _check_learner(config)
    fp8.check_settings(config)
    rollout.check_settings(config)
    _check_files(config)
    _check_trackers(config)
    if data:
        _check_data(config)


def _check_algorithm(c: Config) -> None:
    for key, names in NAMES.items():
        section, name = key.split(".")
        if key != "reward.name" or ":" not in c.reward.name:
            _one_of(key, getattr(getattr(c, section), name), names)
    schedule = {key: value for key, value in c.schedule.items() if key != "name"}
    build_controller(c.loss["name"], c.loss, c.schedule["name"], **schedule)
    build_selection(**c.selection)
    if c.advantage.name == "gae":
        check_gae(c.advantage.params)
        if c.train.steps <= c.critic.warmup_steps:
            raise ValueError(f"critic.warmup_steps={c.critic.warmup_steps} must be below train.steps={c.train.steps}")
    else:
        if c.rollout.n == 1 and (c.advantage.name != "reinforce_pp" or c.advantage.params.get("baseline") == "group"):
            raise ValueError(
                f"rollout.n={c.rollout.n}: advantage.name={c.advantage.name} compares the responses of a prompt, so "
                "every advantage would be 0; set rollout.n to 2 or more, or advantage.name=reinforce_pp"
            )
        compute_advantages(c.advantage.name, torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), **c.advantage.params)
    if c.reference.path is not None and not c.reference.kl_coef:
        raise ValueError(f"reference.path={c.reference.path} has no effect: set reference.kl_coef above 0 or unset it")
    if c.optim.distributed and (c.optim.optimizer != "adam" or c.model.dtype == "float64"):
        raise ValueError(
            "optim.distributed=true works with optim.optimizer=adam in float32 or bfloat16, not with "
            f"{c.optim.optimizer} in {c.model.dtype}: set optim.distributed=false"
        )
    check_reward(c.reward)
    if c.advantage.overlong == "penalty":
        soft_overlong_penalty(
            torch.zeros(1),
            max_tokens=c.rollout.max_tokens,
            buffer=c.advantage.overlong_buffer,
            factor=c.advantage.overlong_factor,
        )
    if c.train.tis_cap is None and (
        c.train.tis_floor or c.train.tis_level != "token" or c.train.tis_mode != "truncate"
    ):
        raise ValueError(
            f"train.tis_level={c.train.tis_level}, train.tis_mode={c.train.tis_mode}, train.tis_floor="
            f"{c.train.tis_floor} have no effect: set train.tis_cap, their upper bound"
        )
    if max(c.train.tis_floor, c.train.tis_veto) > 1:
        raise ValueError(
            f"train.tis_floor={c.train.tis_floor}, train.tis_veto={c.train.tis_veto} must be at most 1: both are lower "
            "bounds on a ratio that is 1 without any mismatch"
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
    if len(c.optim.betas) != 2:
        raise ValueError(f"optim.betas={c.optim.betas} must be two numbers, such as [0.9,0.999]")
    if c.optim.min_lr > c.optim.lr:
        raise ValueError(f"optim.min_lr={c.optim.min_lr} is above optim.lr={c.optim.lr}; lower it")
    if (responses := c.rollout.prompts_per_step * c.rollout.n) > MOST_RESPONSES:
        raise ValueError(
            f"rollout.n={c.rollout.n} x rollout.prompts_per_step={c.rollout.prompts_per_step} are {responses:,} "
            f"responses a step, which are held in memory at once; {MOST_RESPONSES:,} is the most"
        )
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
        "rollout.generated_prompts": generated if surplus and not c.rollout.partial else 0,
        "advantage.max_refills": c.advantage.max_refills,
    }
    for key, value in unused.items():
        if value and not c.advantage.drop_uniform_groups:
            raise ValueError(f"{key}={value} has no effect: set advantage.drop_uniform_groups=true or unset it")


RECOMPUTED = ("mlp", "moe", "core_attn")  # parts of a layer that can be run again alone


def _check_learner(c: Config) -> None:
    if unknown := [name for name in c.model.recompute_modules if name not in RECOMPUTED]:
        raise ValueError(f"model.recompute_modules={unknown[0]} is unknown; choose among {', '.join(RECOMPUTED)}")
    if c.model.recompute_modules and not c.model.recompute:
        raise ValueError(
            f"model.recompute_modules={c.model.recompute_modules} has no effect: set model.recompute=true or unset it"
        )
    if c.optim.overlap_param_gather and not (c.optim.distributed and c.optim.overlap_grad_reduce):
        raise ValueError(
            "optim.overlap_param_gather=true works with optim.distributed=true, whose ranks gather weights, and "
            "optim.overlap_grad_reduce=true, whose buckets it uses: set both, or optim.overlap_param_gather=false"
        )
    if c.optim.bucket_parameters is not None and not c.optim.overlap_grad_reduce:
        raise ValueError(
            f"optim.bucket_parameters={c.optim.bucket_parameters} has no effect: set optim.overlap_grad_reduce=true or "
            "unset it"
        )


def _check_layout(c: Config) -> None:
    p = c.parallel
    size = process_multiple(p)
    if p.nproc is not None and p.nproc % size:
        experts = "" if p.ep == 1 else " and ep x pp"
        raise ValueError(
            f"parallel.nproc={p.nproc} is not a multiple of tp x pp x cp{experts}, so of {size}; choose one"
        )
    if p.vpp > 1 and p.pp < 2:
        raise ValueError(f"parallel.vpp={p.vpp} needs pipeline parallelism: set parallel.pp >= 2 or parallel.vpp=1")
    if p.sp and p.tp < 2:
        raise ValueError("parallel.sp=true splits tokens over tensor-parallel ranks: set parallel.tp >= 2 or drop it")


def _check_files(c: Config) -> None:
    for key, text in (("run.dir", c.run.dir), ("run.name", c.run.name), ("model.cache_dir", c.model.cache_dir)):
        if not text.strip():
            raise ValueError(f"{key}={text!r} is empty; give a {'name' if key == 'run.name' else 'directory'}")
    if Path(c.run.dir).exists() and not Path(c.run.dir).is_dir():
        raise ValueError(f"run.dir={c.run.dir} is a file; give a directory, which is made if it does not exist")
    template = c.data.template.removeprefix("chat").removeprefix(":") if c.data.template.startswith("chat") else ""
    if (template or c.data.template).count("{problem}") != 1 and c.data.template != "chat":
        raise ValueError(f"data.template={c.data.template!r} must contain {{problem}} exactly once, or be 'chat'")
    if missing := PLACEHOLDER.fullmatch(c.model.path):
        raise ValueError(f"model.path: give the Hugging Face directory of {missing[1]}, as model.path=PATH")
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


def _check_trackers(c: Config) -> None:
    for name in c.logging:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"logging=[{name}] needs a package that is not installed: pip install {name}")


def _check_data(c: Config) -> None:
    if missing := PLACEHOLDER.fullmatch(c.data.path or ""):
        raise ValueError(f"data.path: give the JSONL file of {missing[1]}, as data.path=PATH")
    given = [("data.path", c.data.path), *(("data.eval_path", path) for path in eval_paths(c))]
    for key, path in given:
        if path is not None and not Path(path).exists():
            raise ValueError(
                f"{key}={path}: no such file; give JSONL or Parquet with problem and answer (docs/data.md)"
            )
    if c.data.path is None:
        _check_data_name(c.data.name)


def _check_data_name(name: str) -> None:
    """Generated problems need no file; ``owner/name`` is a data set of the hub."""
    if name in ("jsonl", "gsm8k"):
        raise ValueError(f"data.name={name} needs data.path=FILE.jsonl")
    if "/" not in name:
        _one_of("data.name", name, (*GENERATORS, "jsonl", "gsm8k"))


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key}={value} is unknown{near(value, list(allowed))}; choose {' | '.join(allowed)}")
