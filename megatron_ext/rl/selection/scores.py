"""Rules on the entropy and on what a token's update does to it: Clip_B, Clip_V, STEER, forking tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_ext.rl.diagnostics import centred_discriminant, discriminant
from megatron_ext.rl.global_stats import Reduce, exact_sum, global_count, global_mean_std, global_top_k
from megatron_ext.rl.params import check_number
from megatron_ext.rl.selection.base import Selection, SelectionInputs, of_sign, share_of

_TOLERANCE = 1e-12
"""Slack, nats, on the bounds of clip_b and clip_v: with equal scores sigma is 0 and rounding must not decide."""


@dataclass(frozen=True, kw_only=True)
class ClipB(Selection):
    """Drop outliers of S: keep iff -mu_low sigma <= S - S_mean <= mu_high sigma, statistics over all response tokens.

    Entropy Dynamics alg. 1. mu = 2.5, on the lower side of negative tokens only, comes from the authors' public code;
    the paper gives no number.
    """

    statistics: ClassVar[tuple[str, ...]] = ("logp", "entropy")

    mu_low: float = 2.5
    """Lower bound of S - S_mean, in standard deviations; inf is off."""
    mu_high: float = math.inf
    """Upper bound of S - S_mean, in standard deviations; inf is off."""
    tokens: Literal["negative", "positive", "all"] = "negative"
    """Advantage sign of the tokens that can be dropped."""

    def __post_init__(self) -> None:
        check_number("selection.mu_low", self.mu_low, 0, math.inf)
        check_number("selection.mu_high", self.mu_high, 0, math.inf)

    def _score(self, x: SelectionInputs, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
        """(deviation (T,), mean, sigma) of the score that is clipped."""
        score = discriminant(x.stats)
        mean, sigma = global_mean_std(score, x.mask, reduce)
        return score - mean, mean, sigma

    def _keep(self, x: SelectionInputs, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        deviation, mean, sigma = self._score(x, reduce)
        low = deviation < -self.mu_low * sigma - _TOLERANCE if self.mu_low < math.inf else torch.zeros_like(x.mask)
        high = deviation > self.mu_high * sigma + _TOLERANCE if self.mu_high < math.inf else torch.zeros_like(x.mask)
        drop = (low | high) & of_sign(x.advantages, self.tokens)
        return ~drop, {"selection/score_mean": mean, "selection/score_std": sigma}


@dataclass(frozen=True, kw_only=True)
class ClipV(ClipB):
    """Drop outliers of D = S - E_p[S]: keep iff -mu_low sigma' <= D <= mu_high sigma', sigma' = std of D.

    Entropy Dynamics alg. 2. Its eq. 16 subtracts E_p[S] from D a second time, which is an error. D is not centred by
    its batch mean, which is 0 in expectation (cor. 2). mu 2.0 and 8.5 are in the authors' public code; two-sided, as in
    alg. 2.
    """

    statistics = ("logp", "entropy", "sum_p2", "sum_p2_logp")

    mu_low: float = 2.0
    """Lower bound of D, in standard deviations; inf is off."""
    mu_high: float = 2.0
    """Upper bound of D, in standard deviations; inf is off."""

    def _score(self, x: SelectionInputs, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
        score = centred_discriminant(x.stats)
        mean, sigma = global_mean_std(score, x.mask, reduce)
        return score, mean, sigma


@dataclass(frozen=True, kw_only=True)
class Steer(Selection):
    """Weigh every token by how much its update would change the entropy: exp(-k |Omega|), between weight_min and 1.

    Omega = A r (1 - p) (log p + H), the change of H that a step on the token makes, to first order and for its own
    logit alone; k = -log(weight_min) / max(largest |Omega|, omega_floor), so that the token of largest |Omega| gets
    weight_min. Hao et al. 2025, arXiv:2510.10150, by the authors' code (``compute_token_weights``, exponential form).
    They take the largest |Omega| of every micro-batch, here it is the whole batch's.
    """

    statistics: ClassVar[tuple[str, ...]] = ("logp", "entropy")

    weight_min: float = 0.8
    """Weight of the token of largest |Omega|."""
    omega_floor: float = 0.02
    """The largest |Omega| counts at least this much."""

    def __post_init__(self) -> None:
        check_number("selection.weight_min", self.weight_min, 0, 1, exclusive=True)
        check_number("selection.omega_floor", self.omega_floor, 0, exclusive=True)

    def _weight(self, x: SelectionInputs, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        logp, entropy = x.stats.logp.double(), x.stats.entropy.double()
        ratio = 1.0 if x.old_logp is None else (logp - x.old_logp.double()).exp()
        omega = (x.advantages.double() * ratio * -torch.expm1(logp) * (logp + entropy)).abs()
        omega = torch.where(x.mask, omega, 0.0)
        largest = reduce.gather(omega.max().reshape(1) if omega.numel() else omega.new_zeros(1)).max()
        weight = (math.log(self.weight_min) / largest.clamp(min=self.omega_floor) * omega).exp()
        mean = exact_sum(weight[x.mask], reduce) / max(global_count(x.mask, reduce), 1)
        metrics = {"selection/weight_mean": mean, "selection/largest_omega": largest}
        return weight.to(x.advantages.dtype), metrics


@dataclass(frozen=True, kw_only=True)
class Forking(Selection):
    """Only the max(floor(frac N), 1) tokens of highest entropy train. Wang et al. 2025b; Entropy Dynamics sec. 4.2."""

    statistics = ("entropy",)

    frac: float = 0.2
    """Share of the response tokens that trains."""

    def __post_init__(self) -> None:
        check_number("selection.frac", self.frac, 0, 1)

    def _keep(self, x: SelectionInputs, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        k = share_of(self.frac, x, reduce)
        return global_top_k(x.stats.entropy, x.mask, x.seq_ids, x.positions, k, reduce), {}
