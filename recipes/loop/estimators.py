"""Estimators of accuracy from n samples per problem: avg@k, pass@k, maj@k and their uncertainty. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, exp, fsum, lgamma, log

import numpy as np

Outcomes = Sequence[Sequence[bool]]  # [problem][sample]: was the sample correct?
Answers = Sequence[Sequence[str | None]]  # [problem][sample]: the answer that was read, None for none
MAJORITY_DRAWS = 400  # random subsets for maj@k with k < n


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


def maj_at_k(correct: Sequence[bool], answers: Sequence[str | None], k: int, *, seed: int = 0) -> float:
    """Probability that the most frequent answer among k of n samples is right (self-consistency, Wang et al. 2022).

    Correct samples vote for one answer, however they write it; wrong ones for their text; samples without an answer
    do not vote. A tie is broken at random, so it counts with the share of the right answer. Exact for k = n and k = 1,
    else the mean over `MAJORITY_DRAWS` subsets drawn without replacement.
    """
    n = len(correct)
    if not 1 <= k <= n or len(answers) != n:
        raise ValueError(f"maj@{k} of {n} samples with {len(answers)} answers is undefined: it needs 1 <= k <= n")
    if k == 1:
        return sum(correct) / n
    wrong = {text: label for label, text in enumerate(dict.fromkeys(answers), start=1)}
    votes = np.array(
        [0 if right else -1 if text is None else wrong[text] for right, text in zip(correct, answers, strict=True)]
    )
    if k == n:
        return _majority(votes)
    rng = np.random.default_rng(seed)
    return float(np.mean([_majority(rng.permutation(votes)[:k]) for _ in range(MAJORITY_DRAWS)]))


def _majority(votes: np.ndarray) -> float:
    """Probability that class 0 wins; votes of -1 do not count."""
    counts = np.bincount(votes[votes >= 0], minlength=1)
    most = counts.max(initial=0)
    return float(counts[0] == most) / int((counts == most).sum()) if most else 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems with 95 % intervals.

    ``low`` to ``high``: with other problems of the same kind; exact (Clopper-Pearson) where each problem counts as 0 or
    1, else a bootstrap. ``seed_low`` to ``seed_high``: with other samples of the same problems (another seed); None
    where resampling n samples is biased (pass@k with k > n/2, maj@k) or says nothing (n = 1, or equal samples).
    """

    mean: float
    low: float
    high: float
    seed_low: float | None = None
    seed_high: float | None = None


def bootstrap_interval(
    values: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    statistic: Callable[..., np.ndarray] = np.mean,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of per-problem ``values``, resampling problems.

    It is the uncertainty over other problems of the same kind; the sampling noise within a problem is already part of
    the values. ``statistic`` takes ``(array, axis=1)``. Deterministic in ``seed``.
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


def exact_interval(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a binomial share (Clopper and Pearson 1934), which has a width also at 0 and at 1."""
    if not 0 <= successes <= trials or not trials:
        raise ValueError(f"{successes} of {trials} is not a share: it needs 0 <= successes <= trials, and trials")
    tail = (1 - confidence) / 2

    def at_least(k: int, p: float) -> float:
        """P(X >= k) for 0 < p < 1."""
        ways = (lgamma(trials + 1) - lgamma(i + 1) - lgamma(trials - i + 1) for i in range(k, trials + 1))
        return fsum(exp(w + i * log(p) + (trials - i) * log(1 - p)) for i, w in enumerate(ways, start=k))

    def solve(k: int, level: float) -> float:
        """The p at which P(X >= k), which rises with p, is ``level``."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if at_least(k, middle) < level else (low, middle)
        return (low + high) / 2

    return (
        solve(successes, tail) if successes else 0.0,
        solve(successes + 1, 1 - tail) if successes < trials else 1.0,
    )


def problem_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean over problems: exact where every value is 0 or 1, else `bootstrap_interval`."""
    if values and all(value in (0.0, 1.0) for value in values):
        return exact_interval(int(sum(values)), len(values))
    return bootstrap_interval(values, seed=seed)


def seed_interval(
    correct: Sequence[int],
    n: int,
    k: int,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of pass@k (k = 1: avg@n) under other samples of the same problems.

    ``correct``: correct samples of each problem, of n. Each resample draws n samples of every problem with replacement,
    that is a binomial number of correct ones.
    """
    table = np.array([pass_at_k(n, c, k) for c in range(n + 1)])
    shares = np.asarray(correct, dtype=np.float64) / n
    drawn = np.random.default_rng(seed).binomial(n, shares, size=(resamples, len(shares)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(table[drawn].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def summarise(
    outcomes: Outcomes, ks: Sequence[int], *, answers: Answers | None = None, seed: int = 0
) -> dict[str, Estimate]:
    """``avg@n``, ``pass@k`` and, with ``answers``, ``maj@k`` for every k > 1 in ``ks``; 95 % intervals.

    All problems must have the same number n of samples, and every k at most n.
    """
    counts = {len(samples) for samples in outcomes}
    if len(counts) != 1:
        raise ValueError(f"all problems need the same number of samples, got {sorted(counts)}")
    n = counts.pop()
    correct = [sum(samples) for samples in outcomes]
    per_problem = {f"avg@{n}": avg_at_k(outcomes)}
    for k in ks:
        per_problem[f"pass@{k}"] = [pass_at_k(n, c, k) for c in correct]
    if answers is not None:
        for k in (k for k in ks if k > 1):
            pairs = zip(outcomes, answers, strict=True)
            per_problem[f"maj@{k}"] = [maj_at_k(a, b, k, seed=seed + i) for i, (a, b) in enumerate(pairs)]
    resampled = {f"avg@{n}": 1} | {f"pass@{k}": k for k in ks if 2 * k <= n or k == 1}
    if all(c in (0, n) for c in correct):
        resampled = {}  # all samples of a problem agree, so that resampling them changes nothing
    return {
        name: Estimate(
            float(np.mean(values)),
            *problem_interval(values, seed=seed),
            *(seed_interval(correct, n, resampled[name], seed=seed) if name in resampled else ()),
        )
        for name, values in per_problem.items()
    }
