"""BAPO: moves the clip bounds until rewarded tokens contribute enough. Source: Xi et al. 2025, arXiv:2510.18927.

Follows the authors' code (`recipe/bapo/policy_loss.py`): it raises the lower bound first, then the upper one. Bounds
are absolute. The code compares the sum of positive contributions with that of negative ones (``target``); the paper's
share of 0.5 is a quotient of 1. The authors search in every micro-batch of a rank group; here one search covers the
whole mini-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ext.rl.losses.base import Loss, Terms
from megatron_ext.rl.losses.ppo import check_dual_clip, clipped_terms
from megatron_ext.rl.params import check_number
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class Bapo(Loss):
    """PPO's closed forms for the absolute bounds (ratio_min, ratio_max) that `fit` finds for every mini-batch."""

    fits = True

    ratio_min: float = 0.6
    """Lower bound where the search starts."""
    ratio_min_limit: float = 0.9
    """Lower bound where the search ends."""
    ratio_max: float = 1.2
    """Upper bound where the search starts."""
    ratio_max_limit: float = 3.0
    """Upper bound where the search ends."""
    step: float = 0.05
    """Step of the search, for both bounds."""
    target: float = 1.0
    """Smallest quotient of sum max(r' A, 0) and sum max(-r' A, 0), r' bounded above for A > 0 and below for A < 0."""
    dual_clip: float | None = 3.0
    """As in PPO. The default is that of verl, on which the authors' code is based."""

    def __post_init__(self) -> None:
        check_number("loss.ratio_min", self.ratio_min, 0, 1)
        check_number("loss.ratio_min_limit", self.ratio_min_limit, self.ratio_min, 1)
        check_number("loss.ratio_max", self.ratio_max, 1)
        check_number("loss.ratio_max_limit", self.ratio_max_limit, self.ratio_max)
        check_number("loss.step", self.step, 0, 1, exclusive=True)
        check_number("loss.target", self.target, 0)
        check_dual_clip(self.dual_clip)

    def fit(self, ratio: Tensor, advantages: Tensor) -> Bapo:
        low, high = self.ratio_min, self.ratio_max
        while low < self.ratio_min_limit and balance(ratio, advantages, low, high) < self.target:
            low = min(low + self.step, self.ratio_min_limit)
        while high < self.ratio_max_limit and balance(ratio, advantages, low, high) < self.target:
            high = min(high + self.step, self.ratio_max_limit)
        return replace(self, ratio_min=low, ratio_max=high)

    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        terms = clipped_terms(x.advantages, ratio, self.ratio_min, self.ratio_max, self.dual_clip)
        found = {"bapo_ratio_min": self.ratio_min, "bapo_ratio_max": self.ratio_max}
        bounds = {name: torch.full_like(ratio, value) for name, value in found.items()}
        return replace(terms, metrics={**terms.metrics, **bounds})


def balance(ratio: Tensor, advantages: Tensor, ratio_min: float, ratio_max: float) -> float:
    """Positive over negative contributions under these bounds; inf without negative ones."""
    bounded = torch.where(advantages >= 0, ratio.clamp(max=ratio_max), ratio.clamp(min=ratio_min)) * advantages
    positive, negative = float(bounded.clamp(min=0).double().sum()), float((-bounded).clamp(min=0).double().sum())
    return positive / negative if negative > 0 else math.inf
