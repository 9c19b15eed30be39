"""Counters of the learner's computation and its balance, kept by every rank and reduced once per step."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import Config
from megatron_ext.flops import ForwardFlops, peak_tflops


@dataclass(frozen=True, slots=True)
class WorkReport:
    """One step of all ranks together."""

    flops: float  # useful ones of all models and passes, see `megatron_ext.flops`
    ranks: int
    peak_tflops: float | None  # peak of one rank; None if unknown
    time_imbalance: float  # of the busiest rank above the mean, as a share of the mean; 0 at best
    token_imbalance: float  # likewise, of tokens through the models
    peak_memory_gib: float  # of the rank that needed most, since the start: allocated on its GPU, or resident without


class Work:
    """Counters of one model on one rank."""

    def __init__(self, forward_flops: ForwardFlops) -> None:
        self._forward_flops = forward_flops
        self._began = 0.0
        self.flops = 0.0  # of all ranks: every rank knows the whole batch
        self.tokens = 0  # of this rank, padding included
        self.busy_s = 0.0  # of this rank, until it waits for the other data-parallel ranks

    def begin(self, samples: Iterable[tuple[int, int]], tokens: int, *, forward_only: bool) -> None:
        """A pass over ``samples`` (fed tokens, response tokens) of all ranks, ``tokens`` of it on this one."""
        self.flops += (1 if forward_only else 3) * self._forward_flops(samples)
        self.tokens += tokens
        self._began = time.monotonic()

    def end(self) -> None:
        """Mark the end of this rank's part of the pass."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.busy_s += time.monotonic() - self._began


def report(works: list[Work], config: Config, device: torch.device) -> WorkReport:
    """What there is since the last call. A collective of all ranks."""
    mine = [sum(w.busy_s for w in works), float(sum(w.tokens for w in works)), peak_memory_gib()]
    world = dist.get_world_size()
    row = torch.tensor(mine, dtype=torch.float64, device=device)
    rows = [torch.empty_like(row) for _ in range(world)]
    dist.all_gather(rows, row)
    busy, tokens, memory = torch.stack(rows).unbind(1)
    result = WorkReport(
        flops=sum(w.flops for w in works),
        ranks=world,
        peak_tflops=rank_peak(config),
        time_imbalance=_above_mean(busy),
        token_imbalance=_above_mean(tokens),
        peak_memory_gib=float(memory.max()),
    )
    for work in works:
        work.flops, work.tokens, work.busy_s = 0.0, 0, 0.0
    return result


def rank_peak(config: Config) -> float | None:
    """``run.peak_tflops``, or in bfloat16 (and FP8, measured by the same) that of this GPU's name."""
    if config.run.peak_tflops is not None:
        return config.run.peak_tflops
    known = torch.cuda.is_available() and config.model.dtype == "bfloat16"
    return peak_tflops(torch.cuda.get_device_name()) if known else None


def _above_mean(values: Any) -> float:
    mean = float(values.mean())
    return float(values.max()) / mean - 1 if mean else 0.0


def peak_memory_gib() -> float:
    """Peak memory of this learner process: allocated on the GPU, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
