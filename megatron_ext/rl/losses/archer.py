"""Archer: PPO with a wider interval for the uncertain tokens of a response. Source: Wang et al. 2025, arXiv:2507.15778.

By the authors' code (`compute_policy_loss` and `update_policy` of ArcherCodeR). Left out: their KL to the reference on
tokens of low entropy alone (coefficient 0 on the others); ``reference.kl_coef`` is the same for all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ext.rl.losses.base import Loss, Terms, needed
from megatron_ext.rl.losses.ppo import CLIP_ACTUATORS, check_offsets, clipped_terms
from megatron_ext.rl.params import check_number
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class Archer(Loss):
    """PPO's closed forms with eps 0.5 for tokens above the 0.8 quantile of their response's entropies, else 0.2.

    The entropies are those of the current forward pass, detached.
    """

    actuators = CLIP_ACTUATORS

    eps_low: float = 0.2
    """Lower offset; 1 switches clip-low off."""
    eps_high: float = 0.2
    """Upper offset; inf switches clip-high off."""
    uncertain_eps_low: float = 0.5
    """Lower offset for tokens above the quantile."""
    uncertain_eps_high: float = 0.5
    """Upper offset for tokens above the quantile."""
    quantile: float = 0.8
    """Of the entropies of a response, above which a token is uncertain."""
    dual_clip: float | None = 3.0
    """As in PPO; the default of verl, in which the authors' code runs."""

    def __post_init__(self) -> None:
        check_offsets(self.eps_low, self.eps_high, self.dual_clip)
        check_offsets(self.uncertain_eps_low, self.uncertain_eps_high)
        check_number("loss.quantile", self.quantile, 0, 1)

    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        why = "loss.name=archer needs the sequence and the entropy of every token"
        entropy, ids = needed(x.entropy, "entropy", why), needed(x.seq_ids, "seq_ids", why)
        uncertain = x.mask & (entropy > segment_quantile(entropy, ids, x.mask, self.quantile))
        low, high = torch.full_like(ratio, 1 - self.eps_low), torch.full_like(ratio, 1 + self.eps_high)
        low = low.masked_fill(uncertain, 1 - self.uncertain_eps_low)
        high = high.masked_fill(uncertain, 1 + self.uncertain_eps_high)
        terms = clipped_terms(x.advantages, ratio, low, high, self.dual_clip)
        return replace(terms, metrics={**terms.metrics, "uncertain_frac": uncertain})


def segment_quantile(values: Tensor, seq_ids: Tensor, mask: Tensor, q: float) -> Tensor:
    """(T,): for every token the q-quantile of the masked ``values`` of its sequence, linearly interpolated.

    As `torch.quantile`. Unmasked tokens do not count; a sequence without a masked token gets 0.
    """
    ids = torch.unique(seq_ids, return_inverse=True)[1]
    counts = torch.zeros(values.numel(), dtype=torch.long, device=values.device).index_add_(0, ids, mask.long())
    # By sequence, its masked tokens first and in order of their values.
    order = torch.argsort(torch.where(mask, values, torch.inf))
    order = order[torch.argsort(ids[order], stable=True)]
    tokens = torch.zeros_like(counts).index_add_(0, ids, torch.ones_like(ids))
    first = (tokens.cumsum(0) - tokens)[ids]
    place = q * (counts[ids] - 1).clamp(min=0).to(values.dtype)
    below = place.floor()
    sorted_values = torch.where(mask, values, torch.zeros_like(values))[order]
    last = first + (counts[ids] - 1).clamp(min=0)
    low = sorted_values[first + below.long()]
    high = sorted_values[torch.minimum(first + below.long() + 1, last)]
    return low + (place - below) * (high - low)
