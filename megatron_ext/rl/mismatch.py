"""Correction for tokens that were sampled with other probabilities: the rollout engine's, or those of older weights.

Pure: torch only. rho = pi_learner / pi_rollout per token, from the log-probabilities of both before the first update.
verl's rollout correction in these terms: TIS (token, sequence; Yao et al. 2025) is ``truncate``, IcePop
(arXiv:2510.18855) is ``mask`` with two bounds on tokens, geometric rejection is ``mask`` on ``geometric``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ext.rl.diagnostics import ratio_or_zero
from megatron_ext.rl.losses.base import Segments, max_log_ratio
from megatron_ext.rl.params import check_choice, check_number

LEVELS = ("token", "sequence", "geometric")


@dataclass(frozen=True, slots=True)
class Correction:
    """Result of `correct`, (T,) each, detached."""

    weight: Tensor  # multiplies the objective of the token; 1 where nothing is corrected
    keep: Tensor  # bool: False for tokens that leave the batch, denominators included
    metrics: dict[str, float] = field(default_factory=dict)  # named as logged


def correct(
    learner_logp: Tensor,
    rollout_logp: Tensor,
    seq_ids: Tensor,
    mask: Tensor,
    *,
    high: float | None,
    low: float = 0.0,
    level: str = "token",
    mode: str = "truncate",
    veto: float = 0.0,
) -> Correction:
    """Importance weights rho of tokens, or the tokens that leave the batch because rho is out of bounds.

    Args:
        learner_logp, rollout_logp: (T,), nats; tokens outside ``mask`` may hold anything.
        seq_ids: int64 (T,), sequences whole.
        high, low: bounds on rho; ``high=None`` switches the correction off, and only the metrics are computed.
        level: ``token``; ``sequence``: the product over the response, for all its tokens; ``geometric``: the
            geometric mean of its tokens.
        mode: ``truncate`` clamps rho into [low, high]; ``mask`` drops tokens with rho outside and weighs the rest by
        rho.
        veto: sequences with a token of rho below it are dropped, whatever the mode; 0 is off.
    Raises:
        ValueError: an unknown level or mode, or bounds out of range.
    """
    check_choice("train.tis_level", level, LEVELS)
    check_choice("train.tis_mode", mode, ("truncate", "mask"))
    check_number("train.tis_floor", low, 0, 1)
    check_number("train.tis_veto", veto, 0, 1)
    if high is not None:
        check_number("train.tis_cap", high, 0, exclusive=True)
    log_rho = torch.where(mask, learner_logp.detach() - rollout_logp.detach(), 0.0)
    segments = Segments(seq_ids)
    length, total = (segments.spread(segments.sum(v)) for v in (mask.to(log_rho.dtype), log_rho))
    length = length.clamp(min=1)
    cap = max_log_ratio(log_rho.dtype)
    rho = {"token": log_rho, "sequence": total, "geometric": total / length}[level].clamp(max=cap).exp()
    keep, weight, outside = mask, torch.ones_like(rho), torch.zeros_like(mask)
    if high is not None:
        outside = mask & ((rho < low) | (rho > high))
        weight = rho.clamp(min=low, max=high) if mode == "truncate" else rho
        keep = keep & ~outside if mode == "mask" else keep
    catastrophic = (mask & (log_rho.clamp(max=cap).exp() < veto)).to(rho.dtype)
    vetoed = mask & segments.spread(segments.sum(catastrophic) > 0)
    metrics = _metrics(log_rho, total, length, mask, torch.where(keep & ~vetoed, weight, 0.0))
    count = max(int(mask.sum()), 1)
    metrics |= {"out_of_bounds_frac": float(outside.sum()) / count, "vetoed_frac": float(vetoed.sum()) / count}
    return Correction(weight, keep & ~vetoed, {f"mismatch/{name}": value for name, value in metrics.items()})


def _metrics(log_rho: Tensor, total: Tensor, length: Tensor, mask: Tensor, weight: Tensor) -> dict[str, float]:
    """``kl``, ``k3_kl``: KL(rollout || learner) as the mean of -log rho and of rho - log rho - 1; ``chi2_token``,
    ``chi2_seq``: mean of rho^2 - 1 over tokens, and over sequences of the product; ``effective_sample_size``: (sum w)^2
    / (n sum w^2) over the n tokens, in (0, 1]."""
    cap = 0.5 * max_log_ratio(torch.float64)
    log_rho, total, w = log_rho[mask].double(), total[mask].double(), weight[mask].double()
    rho = log_rho.clamp(max=cap).exp()
    per_sequence = 1 / length[mask].double()  # every sequence counts once
    squares = (2 * total).clamp(max=2 * cap).exp()
    n = torch.tensor(float(max(log_rho.numel(), 1)), dtype=torch.float64)
    values = {
        "kl": -log_rho.sum() / n,
        "k3_kl": (rho - log_rho - 1).sum() / n,
        "chi2_token": (rho.square() - 1).sum() / n,
        "chi2_seq": ratio_or_zero(((squares - 1) * per_sequence).sum(), per_sequence.sum()),
        "effective_sample_size": ratio_or_zero(w.sum().square(), n * w.square().sum()),
        "weight_mean": w.sum() / n,
    }
    return {name: float(value) for name, value in values.items()}
