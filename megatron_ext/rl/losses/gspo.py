"""GSPO: PPO's clip on the length-normalised sequence ratio. Source: Zheng et al. 2025; CE-GPPO app. A.1."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from megatron_ext.rl.losses.base import Loss, Segments, Terms, max_log_ratio, needed
from megatron_ext.rl.losses.ppo import CLIP_ACTUATORS, check_offsets, clipped_terms
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class Gspo(Loss):
    """s_i = exp(mean_t (logp - old_logp)) over the masked tokens of sequence i; then PPO's closed forms with s_i for r.

    F = s_i for every token of i, 0 for the whole sequence when PPO's clip holds for (s_i, A_i). Aggregate with
    ``seq_mean_token_mean``: only then is this the gradient of (1/B) sum_i min(s_i A_i, clip(s_i) A_i).
    """

    actuators = CLIP_ACTUATORS

    eps_low: float = 3e-4
    """Lower offset of the sequence ratio."""
    eps_high: float = 4e-4
    """Upper offset of the sequence ratio."""
    dual_clip: float | None = None
    """Absolute upper bound on s_i for A < 0, >= 1; None is off."""

    def __post_init__(self) -> None:
        check_offsets(self.eps_low, self.eps_high, self.dual_clip)

    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        ids = needed(x.seq_ids, "seq_ids", "loss.name=gspo needs the sequence of every token")
        segments = Segments(ids)
        length = segments.sum(x.mask.to(ratio.dtype)).clamp(min=1)
        mean = segments.sum(x.logp - x.old_logp) / length  # 0 outside the mask
        seq_ratio = segments.spread(mean.clamp(max=max_log_ratio(ratio.dtype)).exp())
        terms = clipped_terms(x.advantages, seq_ratio, 1 - self.eps_low, 1 + self.eps_high, self.dual_clip)
        return replace(terms, metrics={**terms.metrics, "seq_ratio_mean": seq_ratio})
