"""Rules on the covariance of advantage and log-probability: Clip-Cov and KL-Cov. Cui et al. 2025."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.rl.global_stats import Reduce, exact_sum, global_count, global_top_k, random_keys
from megatron_ext.rl.losses.ppo import check_offsets
from megatron_ext.rl.params import check_number
from megatron_ext.rl.selection.base import Selection, SelectionInputs, share_of


def advantage_covariance(x: SelectionInputs, reduce: Reduce) -> Tensor:
    """(A - A_mean)(logp - logp_mean) of each token, means over the global batch, float64 (T,). Cui et al. 2025."""
    n = max(global_count(x.mask, reduce), 1)
    advantages, logp = x.advantages.double(), x.stats.logp.double()
    mean_a, mean_l = (exact_sum(v[x.mask], reduce) / n for v in (advantages, logp))
    return (advantages - mean_a) * (logp - mean_l)


@dataclass(frozen=True, kw_only=True)
class ClipCov(Selection):
    """Drop a random max(floor(frac N), 1) of the tokens with cov in (cov_low, cov_high) that PPO does not clip.

    Cui et al. 2025. Before the first update r = 1 and PPO clips nothing; with ``per_update`` the eps below decide.
    """

    statistics = ("logp",)

    frac: float = 2e-4
    """Share of the response tokens that is dropped."""
    cov_low: float = 1.0
    """Lower bound of the covariance of tokens that can be dropped."""
    cov_high: float = 5.0
    """Upper bound of the covariance of tokens that can be dropped."""
    eps_low: float = 0.2
    """With ``per_update``: tokens that PPO clips at 1 - eps_low are not picked."""
    eps_high: float = 0.2
    """With ``per_update``: tokens that PPO clips at 1 + eps_high are not picked."""

    def __post_init__(self) -> None:
        check_number("selection.frac", self.frac, 0, 1)
        check_number("selection.cov_high", self.cov_high, self.cov_low)
        check_offsets(self.eps_low, self.eps_high)

    def _keep(self, x: SelectionInputs, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        cov = advantage_covariance(x, reduce)
        candidates = x.mask & (cov > self.cov_low) & (cov < self.cov_high)
        if x.old_logp is not None:
            ratio = (x.stats.logp.double() - x.old_logp.double()).exp()
            high = (x.advantages > 0) & (ratio > 1 + self.eps_high)
            candidates &= ~(high | ((x.advantages < 0) & (ratio < 1 - self.eps_low)))
        keys = random_keys(x.seed, x.step, x.seq_ids, x.positions)
        drop = global_top_k(keys, candidates, x.seq_ids, x.positions, share_of(self.frac, x, reduce), reduce)
        share = torch.tensor(global_count(candidates, reduce) / max(global_count(x.mask, reduce), 1))
        return ~drop, {"selection/candidate_frac": share}


@dataclass(frozen=True, kw_only=True)
class KlCov(Selection):
    """The max(floor(frac N), 1) tokens of highest cov get the penalty coef * |logp - old_logp|. All tokens train.

    Cui et al. 2025: frac 2e-3 (7B), coef 1; verl has coef 0.1. Their base loss is unclipped: eps_low 1, eps_high inf.
    """

    statistics = ("logp",)

    frac: float = 2e-3
    """Share of the response tokens that gets the penalty."""
    coef: float = 1.0
    """Weight of the penalty."""

    def __post_init__(self) -> None:
        check_number("selection.frac", self.frac, 0, 1)
        check_number("selection.coef", self.coef, 0)

    def _coefficients(
        self, x: SelectionInputs, reduce: Reduce, zeros: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        k = share_of(self.frac, x, reduce)
        picked = global_top_k(advantage_covariance(x, reduce), x.mask, x.seq_ids, x.positions, k, reduce)
        share = torch.tensor(global_count(picked, reduce) / max(global_count(x.mask, reduce), 1))
        return self.coef * picked.to(zeros.dtype), zeros, {"selection/penalised_frac": share}
