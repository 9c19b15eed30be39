"""Ablations by region, rules on the current forward pass, and what adds to the loss or shapes the rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_ext.rl import advantages as _advantages
from megatron_ext.rl.diagnostics import discriminant, region_masks
from megatron_ext.rl.global_stats import Reduce
from megatron_ext.rl.params import check_number
from megatron_ext.rl.selection.base import Selection, SelectionInputs, of_sign
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class Region(Selection):
    """Ablations: drop or keep a region of tokens that is said to raise or lower entropy.

    ``e1`` .. ``e4`` (Flexible Entropy Control sec. 3), on the ratio and p of the current forward pass: e1/e2 have
    A > 0, 1 < r < 1.3 and p > 0.7 / p <= 0.3; e3/e4 have A < 0, 0.7 < r < 1 and the same p. ``drop`` drops the region;
    ``keep`` drops the *other three*. Tokens of no region train normally either way. The paper runs this in the trust
    region 0.7 < r < 1.3 (eps 0.3).
    ``s_positive``, ``s_negative`` (Entropy Dynamics fig. 1): S > 0 or S < 0 among the tokens whose advantage has the
    sign ``advantage``; ``drop`` drops these, ``keep`` drops all others of that sign. The other sign trains normally.
    """

    statistics = ("logp", "entropy")

    region: Literal["e1", "e2", "e3", "e4", "s_positive", "s_negative"] = "e1"
    """A region by ratio, probability and advantage (e1 to e4), or by the sign of S."""
    mode: Literal["drop", "keep"] = "drop"
    """keep drops the other regions."""
    advantage: Literal["positive", "negative"] = "positive"
    """s_positive, s_negative: advantage sign of the tokens."""

    def _keep(self, x: SelectionInputs, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        if self.region.startswith("e"):
            return x.mask, {}
        score = discriminant(x.stats)
        chosen = score > 0 if self.region == "s_positive" else score < 0
        drop = of_sign(x.advantages, self.advantage) & (chosen if self.mode == "drop" else ~chosen)
        return ~drop, {}

    def per_forward(self) -> bool:
        return self.region.startswith("e")

    def inside(self, x: LossInputs) -> Tensor:
        if not self.per_forward():
            return x.mask
        logp = x.logp.detach()
        regions = region_masks(logp, (logp - x.old_logp).exp(), x.advantages)
        chosen = regions.pop(self.region.upper())
        drop = chosen if self.mode == "drop" else torch.stack(list(regions.values())).any(dim=0)
        return x.mask & ~drop


@dataclass(frozen=True, kw_only=True)
class EntropyRatio(Selection):
    """Entropy Ratio Clipping: a token trains only while low < H_now / H_old < high, at every update anew.

    Su et al. 2025, arXiv:2512.05591 (by the authors of CE-GPPO). As in their code, 1e-8 is added to both entropies and
    comparisons are strict; 0.95 and 1.05 are the values of their scripts.
    """

    low: float = 0.95
    """Lower bound of H_now / H_old, excluded."""
    high: float = 1.05
    """Upper bound of H_now / H_old, excluded."""

    def __post_init__(self) -> None:
        check_number("selection.low", self.low, 0, 1)
        check_number("selection.high", self.high, 1)

    def per_forward(self) -> bool:
        return True

    def inside(self, x: LossInputs) -> Tensor:
        if x.entropy is None or x.old_entropy is None:
            raise ValueError("LossInputs.old_entropy is None: selection.name=entropy_ratio needs both entropies.")
        ratio = (x.entropy.detach() + 1e-8) / (x.old_entropy + 1e-8)
        return x.mask & (ratio > self.low) & (ratio < self.high)


@dataclass(frozen=True, kw_only=True)
class EntropyBonus(Selection):
    """Subtract coef * H from every token's loss. CE-GPPO sec. 5.5: 0.001 still collapses there, 0.003 explodes."""

    coef: float = 0.001
    """Weight of the entropy, which is subtracted from the loss."""

    def __post_init__(self) -> None:
        check_number("selection.coef", self.coef)

    def _coefficients(
        self, x: SelectionInputs, reduce: Reduce, zeros: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return zeros, self.coef * x.mask.to(zeros.dtype), {}


@dataclass(frozen=True, kw_only=True)
class Unlikely(Selection):
    """Scale down the rewards of likely responses: `megatron_ext.rl.advantages.unlikely`. All tokens train."""

    beta_rank: float = 0.25
    """Largest share of the reward that a likely correct response loses."""

    def __post_init__(self) -> None:
        check_number("selection.beta_rank", self.beta_rank, 0, 1)

    def shape_rewards(self, rewards_B: Tensor, groups_B: Tensor, seq_logp_B: Tensor) -> Tensor:
        return _advantages.unlikely(rewards_B, groups_B, seq_logp_B, beta_rank=self.beta_rank)
