"""What every token selection has in common: its inputs, its decisions, and the base class."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from megatron_ext.rl.global_stats import Local, Reduce, global_count
from megatron_ext.rl.types import LossInputs, TokenStats


@dataclass(frozen=True, slots=True)
class SelectionInputs:
    """One rank's shard of the batch; every tensor has shape (T,)."""

    stats: TokenStats
    advantages: Tensor
    mask: Tensor  # bool, response tokens that count
    seq_ids: Tensor  # int64, unique over all ranks
    positions: Tensor  # int64, index of the token within its response
    seed: int
    step: int
    old_logp: Tensor | None = None  # None: the statistics are those of the old policy, r = 1 everywhere


@dataclass(frozen=True, slots=True)
class SelectionOutputs:
    """Per-token decisions of shape (T,), and global scalars (equal on all ranks) named as logged."""

    keep: Tensor  # bool; False where the mask is False
    kl_coef: Tensor
    entropy_coef: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None  # >= 0, factor on the policy loss of a token; None: 1


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Every token trains. Base of the selections.

    The learner carries out both options, for any selection.
    """

    statistics: ClassVar[tuple[str, ...]] = ()
    """Fields of `TokenStats` that decide: see `needs`."""

    per_update: bool = False
    """Select anew for every mini-batch, from its own statistics, instead of once per rollout batch."""
    renormalise: bool = False
    """Take dropped tokens out of the denominators (lengths = kept tokens); by default they keep their place."""

    def select(self, x: SelectionInputs, reduce: Reduce | None = None) -> SelectionOutputs:
        """Decide from the statistics pass. ``reduce`` spans the ranks that hold the batch; None: there is one rank.

        Raises:
            ValueError: a statistic or an advantage of a token that counts is not finite: no comparison with NaN is
                true, so every rule would keep such tokens.
        """
        reduce = reduce or Local()
        _check_finite(x)
        keep, metrics = self._keep(x, reduce)
        keep = keep & x.mask
        dropped = global_count(x.mask & ~keep, reduce) / max(global_count(x.mask, reduce), 1)
        zeros = torch.zeros_like(x.advantages)
        kl_coef, entropy_coef, more = self._coefficients(x, reduce, zeros)
        weight, weighing = self._weight(x, reduce)
        metrics = {"selection/dropped_frac": torch.tensor(dropped, dtype=torch.float64), **metrics, **more, **weighing}
        return SelectionOutputs(keep, kl_coef, entropy_coef, metrics, weight)

    def needs(self) -> set[str]:
        """Fields of `TokenStats` that decide; a trainer that lacks one cannot offer the selection."""
        return set(self.statistics)

    def per_forward(self) -> bool:
        """Whether `inside` decides anything; a trainer that does not call it cannot offer the selection."""
        return False

    def inside(self, x: LossInputs) -> Tensor:
        """Bool (T,): tokens that train, by a rule on the importance ratio of the current forward. Default: all."""
        return x.mask

    def shape_rewards(self, rewards_B: Tensor, groups_B: Tensor, seq_logp_B: Tensor) -> Tensor:
        """Rewards (B,) as the advantage estimator should see them. Default: unchanged."""
        return rewards_B

    def _keep(self, x: SelectionInputs, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        return x.mask, {}

    def _coefficients(
        self, x: SelectionInputs, reduce: Reduce, zeros: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return zeros, zeros, {}

    def _weight(self, x: SelectionInputs, reduce: Reduce) -> tuple[Tensor | None, dict[str, Tensor]]:
        return None, {}


def _check_finite(x: SelectionInputs) -> None:
    named = [(name, getattr(x.stats, name)) for name in ("logp", "entropy", "sum_p2", "sum_p2_logp")]
    for name, values in [*named, ("advantages", x.advantages), ("old_logp", x.old_logp)]:
        if values is not None and not bool(torch.isfinite(values[x.mask]).all()):
            count = int((~torch.isfinite(values[x.mask])).sum())
            raise ValueError(f"{name} of {count} of {int(x.mask.sum())} tokens is not finite: the weights are damaged.")


def of_sign(advantages: Tensor, tokens: str) -> Tensor:
    """Tokens with A < 0, A > 0, or all."""
    return {"negative": advantages < 0, "positive": advantages > 0, "all": torch.ones_like(advantages).bool()}[tokens]


def share_of(frac: float, x: SelectionInputs, reduce: Reduce) -> int:
    """max(floor(frac N), 1) of the N response tokens; the slack keeps 0.29 * 100 from being 28."""
    return max(math.floor(frac * global_count(x.mask, reduce) + 1e-9), 1)
