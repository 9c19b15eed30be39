"""PPO's clipped surrogate, which is also GRPO, DAPO (clip-higher) and Clip-Lower, by its two bounds.

Sources: CE-GPPO eq. 1-4; Clip-Low/High sec. 3.2; dual clip: Ye et al. 2020, arXiv:1912.09729.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_ext.rl.losses.base import Actuator, Loss, Terms
from megatron_ext.rl.params import check_number
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class Ppo(Loss):
    """Value min(r A, clip(r, 1-eps_low, 1+eps_high) A); with dual clip and A < 0, at least dual_clip * A.

    F = r, but 0 if (A > 0 and r > 1+eps_high) or (A < 0 and r < 1-eps_low) or (A < 0 and r > dual_clip).
    At a bound the gradient is kept (the comparisons are strict), as autograd through clamp and min has it.
    """

    # Clip-Low/High: theorem 1.
    actuators = MappingProxyType({"eps_high": Actuator(+1, (0.1, 0.4)), "eps_low": Actuator(-1, (0.1, 0.3))})

    eps_low: float = 0.2
    """Lower offset; 1 switches clip-low off (the absolute bound is then 0)."""
    eps_high: float = 0.2
    """Upper offset; inf switches clip-high off."""
    dual_clip: float | None = None
    """Absolute upper bound on r for A < 0, >= 1; None is off."""

    def __post_init__(self) -> None:
        check_offsets(self.eps_low, self.eps_high, self.dual_clip)

    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        return clipped_terms(x.advantages, ratio, 1 - self.eps_low, 1 + self.eps_high, self.dual_clip)


CLIP_ACTUATORS = MappingProxyType({"eps_high": Actuator(+1), "eps_low": Actuator(-1)})
"""Of other losses that clip as PPO does, for a closed loop with limits of the user's; signs as in `Ppo`."""


def check_offsets(eps_low: float, eps_high: float, dual_clip: float | None = None) -> None:
    """Raise ``ValueError`` unless 0 <= eps_low <= 1, eps_high >= 0 and dual_clip (if any) >= 1."""
    check_number("loss.eps_low", eps_low, 0, 1)
    check_number("loss.eps_high", eps_high, 0, math.inf)
    check_dual_clip(dual_clip)


def check_dual_clip(dual_clip: float | None) -> None:
    """Raise ``ValueError`` unless dual_clip is None or >= 1."""
    if dual_clip is not None:
        check_number("loss.dual_clip", dual_clip, 1, math.inf)


def clipped_terms(
    advantages: Tensor,
    ratio: Tensor,
    ratio_min: float | Tensor,
    ratio_max: float | Tensor,
    dual_clip: float | None = None,
) -> Terms:
    """PPO's closed forms for absolute bounds on r, which may differ per token. Shapes (T,)."""
    below, above = ratio < ratio_min, ratio > ratio_max
    negative = advantages < 0
    low, high = negative & below, (advantages > 0) & above
    objective = ratio * advantages
    stopped = low | high
    # The pessimistic side of the clip, without a pass for each bound: min(r A, clip(r) A).
    bounded = ratio.clamp(ratio_min, ratio_max)  # type: ignore[arg-type]  # two numbers or two tensors
    value = torch.where(stopped, bounded * advantages, objective)
    dual = torch.zeros_like(low)
    if dual_clip is not None:
        dual = negative & (ratio > dual_clip)
        stopped, value = stopped | dual, torch.where(dual, dual_clip * advantages, value)
    return Terms(
        value=value,
        gradient=objective.masked_fill(stopped, 0.0),
        below=below,
        above=above,
        metrics={"pg_clipfrac_low": low, "pg_clipfrac_high": high}
        | ({} if dual_clip is None else {"pg_clipfrac_dual": dual}),
    )
