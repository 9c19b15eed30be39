"""SAPO: a smooth gate in place of the clip.

Source: Gao et al. 2025, arXiv:2511.20347 (cited by Flexible Entropy Control).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.rl.losses.base import Loss, Terms
from megatron_ext.rl.params import check_number
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class Sapo(Loss):
    """Value A * sigmoid(tau (r-1)) * 4/tau, F = 4 sigmoid(tau (r-1)) (1 - sigmoid(tau (r-1))) r; F = 1 at r = 1.

    tau = tau_pos if A > 0 else tau_neg. Nothing is clipped: the clip fractions are 0.
    """

    tau_pos: float = 1.0
    """Temperature of the gate where A > 0."""
    tau_neg: float = 1.05
    """Temperature of the gate where A <= 0; a larger one damps these tokens sooner."""

    def __post_init__(self) -> None:
        check_number("loss.tau_pos", self.tau_pos, 0, math.inf, exclusive=True)
        check_number("loss.tau_neg", self.tau_neg, 0, math.inf, exclusive=True)

    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        # full_like: torch.where of two Python numbers is float32, whatever the rest is
        tau = torch.where(x.advantages > 0, torch.full_like(ratio, self.tau_pos), self.tau_neg)
        z = tau * (ratio - 1)
        gate = torch.sigmoid(z)
        # 1 - gate as sigmoid(-z): it stays exact, and reaches 0 before r overflows
        return Terms(value=x.advantages * gate * 4 / tau, gradient=4 * gate * torch.sigmoid(-z) * ratio * x.advantages)
