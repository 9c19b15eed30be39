"""Processes of a parallel layout, optimizer steps per batch, alignment for FP8. Pure arithmetic."""

from __future__ import annotations

import math

from configs.schema import Config, ParallelConfig


def process_multiple(parallel: ParallelConfig) -> int:
    """A divisor of the number of learner processes: dense layers need tp x pp x cp of them, experts ep x pp."""
    return math.lcm(parallel.tp * parallel.pp * parallel.cp, parallel.ep * parallel.pp)


def stage_layers(parallel: ParallelConfig, layers: int) -> list[int]:
    """Layers of each pipeline rank. ValueError, with the key, where they cannot be spread so."""
    p = parallel
    given = {0: p.first_stage_layers, p.pp - 1: p.last_stage_layers}
    fixed = {rank: number for rank, number in given.items() if number is not None}
    keys = f"parallel.first_stage_layers={p.first_stage_layers} parallel.last_stage_layers={p.last_stage_layers}"
    if fixed and p.pp < 2:
        raise ValueError(f"{keys} without pipeline stages: set parallel.pp >= 2, or leave them out")
    left, stages = layers - sum(fixed.values()), p.pp - len(fixed)
    if (left if not stages else left % stages) or left < stages or min(fixed.values(), default=1) < 1:
        if fixed:
            raise ValueError(f"{keys}: the other {left} layers cannot be spread evenly over the other {stages} stages")
        raise ValueError(f"parallel.pp={p.pp} x parallel.vpp={p.vpp} does not divide the model's {layers} layers")
    found = [fixed.get(rank, left // max(stages, 1)) for rank in range(p.pp)]
    if any(number % p.vpp for number in found):
        raise ValueError(
            f"parallel.pp={p.pp} x parallel.vpp={p.vpp} does not divide the model's {layers} layers (stages of {found})"
        )
    return found


def learner_processes(config: Config) -> int:
    """parallel.nproc, or as many as the layout needs."""
    return config.parallel.nproc or process_multiple(config.parallel)


def updates_per_epoch(config: Config) -> int:
    """Optimizer steps of one pass over a full rollout batch. The last one is smaller if prompts are left over."""
    return -(-config.rollout.prompts_per_step // config.train.mini_batch_prompts)


def alignment(config: Config) -> int:
    """A divisor of the tokens of a micro-batch on one rank, and of every dimension of a weight's slice.

    1, or what FP8 matrix products need (docs/gpu.md).
    """
    if config.model.fp8 is None:
        return 1
    return 32 if config.model.fp8_recipe == "mxfp8" else 16
