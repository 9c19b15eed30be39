"""The range of every number of the configuration. Numbers that are not listed must be finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from configs.schema import Config

_AT_LEAST_1 = """
rollout.prompts_per_step rollout.n rollout.max_tokens rollout.num_servers rollout.max_model_len rollout.max_num_seqs
rollout.generated_prompts train.mini_batch_prompts train.epochs train.steps train.micro_batch_tokens
train.keep_checkpoints train.nonfinite_in_a_row eval.problems eval.n eval.k eval.max_tokens data.max_prompt_tokens
parallel.tp parallel.pp parallel.vpp parallel.first_stage_layers parallel.last_stage_layers parallel.cp parallel.ep
parallel.nproc model.warm_start.batch
model.warm_start.check_every model.warm_start.check_problems
"""
_AT_LEAST_0 = """
eval.temperature eval.top_k train.save_every train.loss_chunk_tokens train.entropy_probe_every eval.every optim.lr
optim.min_lr optim.weight_decay optim.clip_grad optim.warmup_steps critic.lr critic.clip_grad critic.warmup_steps
reference.kl_coef run.report_every train.positive_nll_coef train.tis_floor train.tis_veto
train.stop_after_silent_steps advantage.max_refills
advantage.overlong_buffer advantage.overlong_factor rollout.max_staleness model.warm_start.max_steps
model.warm_start.min_steps train.keep_logits_gib optim.bucket_parameters
"""
_ABOVE_0 = """
optim.eps train.tis_cap rollout.temperature rollout.timeout_s rollout.update_timeout_s rollout.start_timeout_s
rollout.probe_s rollout.revive_timeout_s rollout.agreement_limit reward.timeout_s critic.clip_range
run.peak_tflops run.collective_timeout_s run.hang_s model.warm_start.lr
"""
# key -> (low, high, whether low itself is excluded)
RANGES: dict[str, tuple[float, float, bool]] = {
    **dict.fromkeys(_AT_LEAST_1.split(), (1, math.inf, False)),
    **dict.fromkeys(_AT_LEAST_0.split(), (0, math.inf, False)),
    **dict.fromkeys(_ABOVE_0.split(), (0, math.inf, True)),
    **dict.fromkeys(("rollout.top_p", "eval.top_p", "rollout.gpu_memory_utilization"), (0, 1, True)),
    "model.warm_start.target_greedy_accuracy": (0, 1, False),
    "optim.betas": (0, 1 - 2**-24, False),
    "seed": (0, 2**32 - 1, False),  # what numpy takes
    "model.warm_start.seed": (0, 2**32 - 1, False),
    "reward.memory_mb": (256, math.inf, False),  # less does not hold the computer algebra system
    "reward.workers": (1, 1024, False),
    "train.threads": (1, 1024, False),
}
_INSTEAD = {  # what the user may have meant by a value out of range
    "train.steps": "; python -m recipes.evaluate measures a model without training it",
    "optim.clip_grad": "; 0 switches clipping off",
    "critic.clip_range": "; null switches clipping off",
    "train.tis_cap": "; null switches the correction off",
    "run.hang_s": "; null takes 60, or 600 on a CPU",
    "run.peak_tflops": "; null looks it up by the GPU's name",
    "eval.max_tokens": "; null takes rollout.max_tokens",
    "rollout.generated_prompts": "; null takes rollout.prompts_per_step",
    "parallel.nproc": "; null takes the fewest that the layout needs",
}


def check(config: Config) -> None:
    """Raises ValueError naming the first number that is not finite or out of its range."""
    for key, value in numbers(config):
        if not math.isfinite(value):
            raise ValueError(f"{key}={value} must be a finite number{_INSTEAD.get(key, '')}")
        low, high, open_below = RANGES.get(key, (-math.inf, math.inf, False))
        if value < low or value > high or (open_below and value == low):
            raise ValueError(f"{key}={value} must be {wanted(key)}{_INSTEAD.get(key, '')}")


def wanted(key: str) -> str:
    """A range in words."""
    low, high, open_below = RANGES[key]
    words = f"above {low:g}" if open_below else f"at least {low:g}"
    if high == math.inf:
        return words
    return f"{words} and below 1" if high < 1 else f"{words} and at most {int(high)}"


def numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, value) of every number of the schema, those in lists one by one."""
    for f in fields(section):
        value, key = getattr(section, f.name), prefix + f.name
        if is_dataclass(value):
            yield from numbers(value, f"{key}.")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, (int, float)) and not isinstance(item, bool):
                yield key, item
