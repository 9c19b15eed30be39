"""Processes of a parallel layout, optimizer steps per batch, alignment for FP8. Pure arithmetic."""

from __future__ import annotations

import math

from configs.schema import Config, ParallelConfig


def process_multiple(parallel: ParallelConfig) -> int:
    """A divisor of the number of learner processes: dense layers need tp x pp x cp of them, experts ep x pp."""
    return math.lcm(parallel.tp * parallel.pp * parallel.cp, parallel.ep * parallel.pp)


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
