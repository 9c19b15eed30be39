"""The three kinds of checks, and the random policies they use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recipes.studies import theorems as t

ETA = 1e-3
POLICIES = 20


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a check."""

    verdict: str
    """holds | holds in expectation | approximate | fails"""
    measured: str
    """The measurement as text for the reader."""
    order: float | None = None
    """Median residual order of a first-order check."""
    breaks_at: float | None = None
    """Step size at which the relative error of the prediction exceeds 10 % (median over policies)."""
    pairs: list[tuple[float, float]] = field(default_factory=list)
    """(predicted, measured) change of entropy at `ETA`."""
    errors: list[tuple[float, float]] = field(default_factory=list)
    """(eta, median relative error), for the chart."""


@dataclass(frozen=True, kw_only=True)
class Check:
    paper: str
    label: str
    statement: str
    expected: str
    """The verdict to expect from the paper, as `theorems` reads it."""
    run: Callable[[], Outcome]


def checks_of(paper: str, *rows: tuple[str, str, str, Callable[[], Outcome]]) -> list[Check]:
    """The checks of a paper. A row is (label, statement, expected, run)."""
    return [Check(paper=paper, label=x, statement=s, expected=e, run=r) for x, s, e, r in rows]


def logits(seed: int, *shape: int, scale: float = 1.5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def drifted(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """(current, old) logits: the current policy is a few updates away from the sampling policy."""
    old = logits(seed, size)
    return old + logits(seed + 5000, size, scale=0.6), old


def first_order(make: Callable[[int], tuple[Tensor, t.FirstOrder]], *, order: int = 2) -> Callable[[], Outcome]:
    """``make(seed)`` returns logits and a claim. ``order`` is the expected order (1 for a claim known to be wrong)."""

    def run() -> Outcome:
        orders, pairs, etas, breaks = [], [], [10.0**e for e in range(-5, 2)], []
        relative: list[list[float]] = [[] for _ in etas]
        for seed in range(POLICIES):
            z, claim = make(seed)
            if float(claim.direction.abs().max()) == 0:
                continue  # nothing is clipped in this draw
            orders.append(float(t.residual_order(z, claim, ETA)))
            change = _change(z, claim)
            pairs.append((ETA * float(claim.slope), change(ETA)))
            scale = max(abs(float(claim.slope)), 1e-12)
            for i, eta in enumerate(etas):
                relative[i].append(abs(change(eta) - eta * float(claim.slope)) / (eta * scale))
            breaks.append(_breaking_step(change, float(claim.slope)))
        median = _median(orders)
        good = abs(median - order) < 0.1
        verdict = "holds" if order == 2 and good else "fails"
        text = f"error falls with step size to the power {median:.2f} ({len(orders)} policies)"
        errors = [(eta, _median(values)) for eta, values in zip(etas, relative, strict=True)]
        return Outcome(
            verdict=verdict, measured=text, order=median, breaks_at=_median(breaks), pairs=pairs, errors=errors
        )

    return run


def _change(z: Tensor, claim: t.FirstOrder) -> Callable[[float], float]:
    before = t.entropy(z)
    return lambda eta: float(t.entropy(z + eta * claim.direction) - before)


def _breaking_step(change: Callable[[float], float], slope: float) -> float:
    """The first step size 1e-4 x 1.5^n at which the error of the prediction exceeds 10 %."""
    eta = 1e-4
    while eta < 1e3 and abs(change(eta) - eta * slope) <= 0.1 * abs(eta * slope):
        eta *= 1.5
    return eta


def identity(
    error: Callable[[int], float], *, tolerance: float = 1e-12, verdict: str = "holds"
) -> Callable[[], Outcome]:
    """``error(seed)`` returns the largest difference of the two sides."""

    def run() -> Outcome:
        worst = max(error(seed) for seed in range(POLICIES))
        found = verdict if worst < tolerance else "fails"
        return Outcome(verdict=found, measured=f"largest difference {worst:.1e} over {POLICIES} policies")

    return run


def share(
    count: Callable[[], tuple[float, str]], low: float, high: float, verdict: str = "approximate"
) -> Callable[[], Outcome]:
    """``count()`` returns a share in [0, 1] and its description. A share in [low, high] gets ``verdict``."""

    def run() -> Outcome:
        value, text = count()
        return Outcome(verdict=verdict if low <= value <= high else "fails", measured=f"{value:.1%} {text}")

    return run


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
