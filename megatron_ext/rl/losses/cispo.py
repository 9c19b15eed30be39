"""CISPO: REINFORCE with a clipped, stop-gradient importance weight. Source: MiniMax-M1 2025; CE-GPPO sec. 5.4.

Public codes differ in the bound: here [1-eps_low, 1+eps_high], both sides, both signs of A (as verl, slime, NeMo-RL).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_ext.rl.losses.base import Loss, Terms
from megatron_ext.rl.losses.ppo import check_offsets
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class Cispo(Loss):
    """Value sg(clip(r, 1-eps_low, 1+eps_high)) * A * logp, so F is that clip. No token is dropped."""

    eps_low: float = 0.2
    """Lower offset: the bound is 1 - eps_low."""
    eps_high: float = 0.2
    """Upper offset: the bound is 1 + eps_high."""

    def __post_init__(self) -> None:
        check_offsets(self.eps_low, self.eps_high)

    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        low, high = 1 - self.eps_low, 1 + self.eps_high
        weight = ratio.clamp(low, high)
        below, above = ratio < low, ratio > high
        clipped = {"pg_clipfrac_low": below, "pg_clipfrac_high": above}
        return Terms(weight * x.advantages * x.logp, weight * x.advantages, below, above, clipped)
