"""DCPO's dynamic adaptive clipping: bounds that depend on the old probability.

Source: Yang et al. 2025, arXiv:2509.02333, following the authors' code (`get_clip_low_high`). Their smooth advantage
standardisation, which keeps statistics of every prompt over the run, is not implemented.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_ext.rl.losses.base import Loss, Terms
from megatron_ext.rl.losses.ppo import CLIP_ACTUATORS, check_dual_clip, clipped_terms
from megatron_ext.rl.params import check_number
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class Dcpo(Loss):
    """PPO's closed forms with (1 + sqrt(max(1 - 4 eps_low / q, 0))) / 2 <= r <= (1 + sqrt(1 + 4 eps_high / q)) / 2.

    q = exp(old_logp). The bounds solve (r - 1) r q = -eps_low and (r - 1) r q = eps_high, so the interval is wider for
    unlikely tokens. The upper bound is at most ``ratio_cap``.
    """

    actuators = CLIP_ACTUATORS

    eps_low: float = 0.2
    """The lower bound solves (r - 1) r q = -eps_low."""
    eps_high: float = 0.28
    """The upper bound solves (r - 1) r q = eps_high."""
    ratio_cap: float = 10.0
    """Largest upper bound on the ratio."""
    dual_clip: float | None = 10.0
    """As in PPO: gradient 0 where A < 0 and r > dual_clip; the authors' scripts have 10."""

    def __post_init__(self) -> None:
        check_number("loss.eps_low", self.eps_low, 0)
        check_number("loss.eps_high", self.eps_high, 0)
        check_number("loss.ratio_cap", self.ratio_cap, 1, math.inf)
        check_dual_clip(self.dual_clip)

    def bounds(self, old_logp: Tensor) -> tuple[Tensor, Tensor]:
        """Absolute bounds on r, (T,) each."""
        inverse = (-old_logp).clamp(max=80).exp()  # 1 / q, finite
        low = (1 + (1 - 4 * self.eps_low * inverse).clamp(min=0).sqrt()) / 2
        high = (1 + (1 + 4 * self.eps_high * inverse).sqrt()) / 2
        return low, high.clamp(max=self.ratio_cap)

    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        low, high = self.bounds(x.old_logp)
        return clipped_terms(x.advantages, ratio, low, high, self.dual_clip)
