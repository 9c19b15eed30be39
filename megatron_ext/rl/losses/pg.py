"""REINFORCE. Source: Clip-Low/High eq. 2."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_ext.rl.losses.base import Loss, Terms
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Loss):
    """Value A * logp, F = 1. It has no ratio, so it does not correct for off-policy data."""

    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        return Terms(value=x.advantages * x.logp, gradient=x.advantages)
