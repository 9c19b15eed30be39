"""How many processes a parallel layout needs. Pure arithmetic."""

from __future__ import annotations

import math

from configs.schema import Config, ParallelConfig


def process_multiple(parallel: ParallelConfig) -> int:
    """What the number of learner processes is a multiple of: dense layers lie over tp x pp x cp of them, experts over
    ep x pp."""
    return math.lcm(parallel.tp * parallel.pp * parallel.cp, parallel.ep * parallel.pp)


def learner_processes(config: Config) -> int:
    """parallel.nproc, or as many as the layout needs."""
    return config.parallel.nproc or process_multiple(config.parallel)
