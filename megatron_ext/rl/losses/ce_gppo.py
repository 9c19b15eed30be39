"""CE-GPPO: PPO that keeps a bounded gradient outside the clipping interval. Source: CE-GPPO eq. 8-10.

Resolutions. beta1 belongs to the LEFT branch (A < 0, r < 1-eps_low), beta2 to the RIGHT one (A > 0, r > 1+eps_high):
eq. 8 and sec. 5.1 say so; the sentence of sec. 3.2 that pairs beta1 with positive-advantage tokens is an error.
Our departures, all off by default: ``ratio_stop_*`` (beta1 (1-eps) does not vanish as r -> 0, so pushing a token down
is not self-limiting), and ``dual_clip``, which is in the authors' scripts but not in the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_ext.rl.losses.base import Actuator, Loss, Terms
from megatron_ext.rl.losses.ppo import CLIP_ACTUATORS, check_offsets, clipped_terms
from megatron_ext.rl.params import check_number
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class CeGppo(Loss):
    """F = beta1 (1-eps_low) on the left branch, beta2 (1+eps_high) on the right one, else r; value F * A.

    The value is F * A * exp(logp - sg(logp)) and never r / sg(r), which is 0/0 once r underflows.
    With beta1 = beta2 = 0 the gradient is PPO's bit for bit; the values differ (0 against (1 +- eps) A).
    """

    # Sec. 5.1. beta1 stops at 0.75, the paper's setting for 7B: beta1 = 1 was unstable at small scale.
    actuators = MappingProxyType(
        {"beta1": Actuator(-1, (0.0, 0.75)), "beta2": Actuator(+1, (0.5, 1.0)), **CLIP_ACTUATORS}
    )

    beta1: float = 0.5
    """Weight of the left branch, >= 0. Larger: entropy falls faster."""
    beta2: float = 1.0
    """Weight of the right branch, >= 0. Larger: entropy falls more slowly."""
    eps_low: float = 0.2
    """Lower offset: the bound is 1 - eps_low."""
    eps_high: float = 0.2
    """Upper offset: the bound is 1 + eps_high."""
    ratio_stop_low: float | None = None
    """Left branch: gradient 0 where r < ratio_stop_low (absolute, <= 1-eps_low); None or 0 is off."""
    ratio_stop_high: float | None = None
    """Right branch: gradient 0 where r > ratio_stop_high (absolute, >= 1+eps_high); None or inf is off."""
    dual_clip: float | None = None
    """As in PPO: gradient 0 and value dual_clip * A where A < 0 and r > dual_clip. Authors' script: 10."""

    def __post_init__(self) -> None:
        check_number("loss.beta1", self.beta1, 0)
        check_number("loss.beta2", self.beta2, 0)
        check_offsets(self.eps_low, self.eps_high, self.dual_clip)
        if self.ratio_stop_low is not None:
            check_number("loss.ratio_stop_low", self.ratio_stop_low, 0, 1 - self.eps_low)
        if self.ratio_stop_high is not None:
            check_number("loss.ratio_stop_high", self.ratio_stop_high, 1 + self.eps_high, math.inf)

    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        ppo = clipped_terms(x.advantages, ratio, 1 - self.eps_low, 1 + self.eps_high, self.dual_clip)
        left, right = ppo.metrics["pg_clipfrac_low"], ppo.metrics["pg_clipfrac_high"]
        gradient = torch.where(left, self.beta1 * (1 - self.eps_low) * x.advantages, ppo.gradient)
        if self.eps_high < math.inf:  # otherwise the right branch is empty, and 0 * inf is NaN
            gradient = torch.where(right, self.beta2 * (1 + self.eps_high) * x.advantages, gradient)
        stops = {}
        if self.ratio_stop_low is not None:
            stops["ratio_stop_frac_low"] = left & (ratio < self.ratio_stop_low)
        if self.ratio_stop_high is not None:
            stops["ratio_stop_frac_high"] = right & (ratio > self.ratio_stop_high)
        for stopped in stops.values():
            gradient = gradient.masked_fill(stopped, 0.0)
        value = torch.where(left | right, gradient, ppo.value)
        return replace(ppo, value=value, gradient=gradient, metrics={**ppo.metrics, **stops})
