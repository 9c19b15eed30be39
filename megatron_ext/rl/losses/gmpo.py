"""GMPO: geometric mean of clipped token ratios. Source: Zhao et al. 2025, arXiv:2507.20673, by verl's `geo_mean`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ext.rl.losses.base import Loss, Segments, Terms, max_log_ratio, needed
from megatron_ext.rl.params import check_number
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class Gmpo(Loss):
    """s_i = exp(mean_t l'_t) with l'_t = log r, clipped to [-log_eps_low, log_eps_high] on PPO's pessimistic side.

    F = s_i for every token of i, 0 for a clipped token; value s_i A_i. Aggregate with ``seq_mean_token_mean``: only
    then is this the gradient of (1/B) sum_i s_i A_i.
    """

    log_eps_low: float = 0.4
    """Bound on -log r where A < 0. The paper's interval is (e^-0.4, e^0.4)."""
    log_eps_high: float = 0.4
    """Bound on log r where A > 0."""

    def __post_init__(self) -> None:
        check_number("loss.log_eps_low", self.log_eps_low, 0)
        check_number("loss.log_eps_high", self.log_eps_high, 0)

    def terms(self, x: LossInputs, ratio: torch.Tensor) -> Terms:
        ids = needed(x.seq_ids, "seq_ids", "loss.name=gmpo needs the sequence of every token")
        log_ratio = x.logp - x.old_logp  # 0 outside the mask
        below, above = log_ratio < -self.log_eps_low, log_ratio > self.log_eps_high
        low, high = (x.advantages < 0) & below, (x.advantages > 0) & above
        bounded = torch.where(low, -self.log_eps_low, torch.where(high, self.log_eps_high, log_ratio))
        segments = Segments(ids)
        length = segments.sum(x.mask.to(ratio.dtype)).clamp(min=1)
        mean = segments.sum(bounded) / length
        seq_ratio = segments.spread(mean.clamp(max=max_log_ratio(ratio.dtype)).exp())
        value = seq_ratio * x.advantages
        gradient = torch.where(low | high, torch.zeros_like(value), value)
        metrics = {"pg_clipfrac_low": low, "pg_clipfrac_high": high, "seq_ratio_mean": seq_ratio}
        return Terms(value, gradient, below, above, metrics)
