"""Statistics over seeds: means with t intervals, paired differences, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over ``n`` seeds and the half width of its 95 % t interval (nan for one seed)."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        if math.isnan(self.half):
            return f"{self.mean:{spec}}"
        return f"{self.mean:{spec}} ± {abs(self.half):{spec.lstrip('+')}}"


def student_tail(t: float, df: int) -> float:
    """P(T > t) for t >= 0 of Student's distribution, by integrating its density; absolute error below 1e-7."""
    # With t = sqrt(df) tan(u) the density becomes a power of cos(u), which is smooth on [0, pi/2].
    u = np.linspace(math.atan(t / math.sqrt(df)), math.pi / 2, 4001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return float(scale * np.trapezoid(np.cos(u).clip(0) ** (df - 1), u))


@lru_cache(maxsize=512)
def student_quantile(confidence: float, df: int) -> float:
    """t with P(|T| <= t) = confidence."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 2 * student_tail(middle, df) > 1 - confidence else (low, middle)
    return high


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and t interval.

    Raises:
        ValueError: no value, or a value that is not finite. Runs without a value are counted elsewhere, not averaged.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"an interval needs finite values, got {list(values)[:5]}")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, math.nan, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Interval(mean, student_quantile(confidence, n - 1) * math.sqrt(variance / n), n)


def paired(values: dict[int, float], baseline: dict[int, float]) -> tuple[Interval, float]:
    """Interval of the differences over common seeds, and the two-sided p-value of the paired t test."""
    both = sorted(values.keys() & baseline.keys())
    differences = [values[seed] - baseline[seed] for seed in both]
    result = interval(differences)
    if result.n < 2:
        return result, math.nan
    error = result.half / student_quantile(0.95, result.n - 1)
    if error == 0:
        return result, 1.0 if result.mean == 0 else 0.0
    return result, 2 * student_tail(abs(result.mean) / error, result.n - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values of a family of tests. nan stays nan and is not counted as a test."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, running = list(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p))
        adjusted[i] = running
    return adjusted


def wilson(count: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.959964
    centre, spread = count + z * z / 2, z * math.sqrt(count * (n - count) / n + z * z / 4)
    return (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)
