"""Estimators of accuracy from n samples per problem: avg@k, pass@k and their uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

Outcomes = Sequence[Sequence[bool]]  # [problem][sample]: was the sample correct?


def avg_at_k(outcomes: Outcomes) -> list[float]:
    """Share of correct samples of each problem; the mean over problems is avg@k with k samples per problem."""
    if not outcomes or not all(outcomes):
        raise ValueError("avg@k needs at least one problem and one sample per problem")
    return [sum(samples) / len(samples) for samples in outcomes]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, include one of the c correct ones.

    ``1 - C(n-c, k) / C(n, k)``: the unbiased estimator of pass@k (Chen et al. 2021, eq. 1), in exact integers.
    Raises ``ValueError`` unless ``0 <= c <= n`` and ``1 <= k <= n``.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} with {c} correct of {n} samples is undefined: it needs 0 <= c <= n and 1 <= k <= n")
    return 1 - comb(n - c, k) / comb(n, k)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems with a bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    statistic: Callable[..., np.ndarray] = np.mean,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of per-problem ``values``, resampling problems.

    It says how far the number could move with other problems of the same kind; sampling noise within a problem is
    part of the values already. ``statistic`` takes ``(array, axis=1)``. Deterministic in ``seed``.
    """
    if not values:
        raise ValueError("a bootstrap interval needs at least one problem")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistic(array[picks], axis=1), [tail, 1 - tail])
    return float(low), float(high)


def summarise(outcomes: Outcomes, ks: Sequence[int], *, seed: int = 0) -> dict[str, Estimate]:
    """``avg@n`` and ``pass@k`` for every k in ``ks``, each with its 95 % interval over problems.

    All problems must have the same number n of samples, and every k at most n.
    """
    counts = {len(samples) for samples in outcomes}
    if len(counts) != 1:
        raise ValueError(f"all problems need the same number of samples, got {sorted(counts)}")
    n = counts.pop()
    per_problem = {f"avg@{n}": avg_at_k(outcomes)}
    for k in ks:
        per_problem[f"pass@{k}"] = [pass_at_k(n, sum(samples), k) for samples in outcomes]
    return {
        name: Estimate(float(np.mean(values)), *bootstrap_interval(values, seed=seed))
        for name, values in per_problem.items()
    }
