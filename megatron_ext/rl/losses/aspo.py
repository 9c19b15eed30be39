"""ASPO: inverts the importance ratio of rewarded tokens. Source: Wang et al. 2025, arXiv:2510.06062, and its code.

The authors' code (Archer2.0, `compute_policy_loss_archer`) also widens the interval for tokens of high entropy. That
belongs to another method (Archer) and is not implemented.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ext.rl.losses.base import Loss, Terms
from megatron_ext.rl.losses.ppo import CLIP_ACTUATORS, check_offsets
from megatron_ext.rl.params import check_number
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class Aspo(Loss):
    """F = min(1/r, soft_cap) if A > 0, 0 where r > 1+eps_high; F = min(r, soft_cap) if A < 0, 0 where r < 1-eps_low.

    A rewarded token with a small ratio thus gets a larger weight, not a smaller one. The cap is soft: beyond it the
    weight is constant and the gradient stays.
    """

    actuators = CLIP_ACTUATORS

    eps_low: float = 0.2
    """Lower offset: the bound is 1 - eps_low."""
    eps_high: float = 0.2
    """Upper offset: the bound is 1 + eps_high."""
    soft_cap: float = 3.0
    """Upper bound on either weight, > 1."""

    def __post_init__(self) -> None:
        check_offsets(self.eps_low, self.eps_high)
        check_number("loss.soft_cap", self.soft_cap, 1)

    def terms(self, x: LossInputs, ratio: torch.Tensor) -> Terms:
        below, above = ratio < 1 - self.eps_low, ratio > 1 + self.eps_high
        negative, positive = x.advantages < 0, x.advantages > 0
        low, high = negative & below, positive & above
        bounded = torch.where(low, 1 - self.eps_low, torch.where(high, 1 + self.eps_high, ratio))
        weight = torch.where(positive, 1 / bounded.clamp(min=1 / self.soft_cap), bounded)
        capped = (negative & (bounded > self.soft_cap)) | (positive & (bounded < 1 / self.soft_cap))
        weight = weight.clamp(max=self.soft_cap)
        value = weight * x.advantages
        gradient = torch.where(low | high, torch.zeros_like(value), value)
        metrics = {"pg_clipfrac_low": low, "pg_clipfrac_high": high, "pg_clipfrac_dual": capped}
        return Terms(value, gradient, below, above, metrics)
