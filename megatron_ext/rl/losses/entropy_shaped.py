"""Entropy-shaped advantages: PPO with a bonus for tokens chosen where the policy is uncertain.

Source: Cheng et al. 2025, *Reasoning with Exploration: An Entropy Perspective*, arXiv:2506.14758, by the paper's text
and its printed code. This is no entropy bonus: no gradient flows through the entropy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_ext.rl.losses.base import Actuator, Loss, Terms, needed
from megatron_ext.rl.losses.ppo import CLIP_ACTUATORS, check_offsets, clipped_terms
from megatron_ext.rl.params import check_number
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class EntropyShaped(Loss):
    """PPO's closed forms for A' = A + min(alpha H, |A| / kappa), H of the current forward pass, detached.

    With kappa > 1 the sign of A stays, and A = 0 gets nothing.
    """

    actuators = MappingProxyType({**CLIP_ACTUATORS, "alpha": Actuator(+1)})

    eps_low: float = 0.2
    """Lower offset; 1 switches clip-low off."""
    eps_high: float = 0.2
    """Upper offset; inf switches clip-high off."""
    dual_clip: float | None = None
    """Absolute upper bound on r for A < 0, >= 1; None is off."""
    alpha: float = 0.4
    """Bonus per nat of entropy. The paper: 0.4 with GRPO, 0.1 with PPO."""
    kappa: float = 2.0
    """Bound on the bonus: |A| / kappa; > 1."""

    def __post_init__(self) -> None:
        check_offsets(self.eps_low, self.eps_high, self.dual_clip)
        check_number("loss.alpha", self.alpha, 0)
        check_number("loss.kappa", self.kappa, 1)

    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        entropy = needed(x.entropy, "entropy", "loss.name=entropy_shaped needs the entropy of every token")
        bonus = torch.minimum(self.alpha * entropy, x.advantages.abs() / self.kappa)
        terms = clipped_terms(x.advantages + bonus, ratio, 1 - self.eps_low, 1 + self.eps_high, self.dual_clip)
        return replace(terms, metrics={**terms.metrics, "advantage_bonus": bonus})
