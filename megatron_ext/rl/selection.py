"""Token selection: which tokens train, and which get a penalty. Composes with any loss and any schedule.

The learner's per-token loss is  keep * loss + kl_coef * |logp - old_logp| - entropy_coef * H.

Whatever looks at the whole batch does so over the *global* batch, through an injected `Reduce`, from a statistics pass
with the weights in force before the update; the set is the same for any micro-batching or layout. "Batch" is the
rollout batch, selected once before its first update, or with ``per_update`` each mini-batch. Standard deviations are
population ones.
Sources: Entropy Dynamics alg. 1-2 and sec. 4.2, 5.2; Flexible Entropy Control sec. 3; CE-GPPO sec. 5.5;
Cui et al. 2025 (Clip-Cov, KL-Cov); Wang et al. 2025b (forking tokens); He et al. 2025 (unlikely).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megatron_ext.rl import advantages as _advantages
from megatron_ext.rl import params as _params
from megatron_ext.rl.diagnostics import centred_discriminant, discriminant, region_masks
from megatron_ext.rl.global_stats import (
    Local,
    Reduce,
    exact_sum,
    global_count,
    global_mean_std,
    global_top_k,
    random_keys,
)
from megatron_ext.rl.losses.ppo import check_offsets
from megatron_ext.rl.params import check_number
from megatron_ext.rl.types import LossInputs, TokenStats

_TOLERANCE = 1e-12
"""Slack, nats, on the bounds of clip_b and clip_v: with equal scores sigma is 0 and rounding must not decide."""


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
        share = torch.tensor(dropped, dtype=torch.float64)
        return SelectionOutputs(keep, kl_coef, entropy_coef, {"selection/dropped_frac": share, **metrics, **more})

    def needs(self) -> set[str]:
        """Fields of `TokenStats` that decide; a trainer that lacks one cannot offer the selection."""
        return set(self.statistics)

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


def _check_finite(x: SelectionInputs) -> None:
    named = [(name, getattr(x.stats, name)) for name in ("logp", "entropy", "sum_p2", "sum_p2_logp")]
    for name, values in [*named, ("advantages", x.advantages), ("old_logp", x.old_logp)]:
        if values is not None and not bool(torch.isfinite(values[x.mask]).all()):
            count = int((~torch.isfinite(values[x.mask])).sum())
            raise ValueError(f"{name} of {count} of {int(x.mask.sum())} tokens is not finite: the weights are damaged.")


def _of_sign(advantages: Tensor, tokens: str) -> Tensor:
    """Tokens with A < 0, A > 0, or all."""
    return {"negative": advantages < 0, "positive": advantages > 0, "all": torch.ones_like(advantages).bool()}[tokens]


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
        drop = (low | high) & _of_sign(x.advantages, self.tokens)
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


def advantage_covariance(x: SelectionInputs, reduce: Reduce) -> Tensor:
    """(A - A_mean)(logp - logp_mean) of each token, means over the global batch, float64 (T,). Cui et al. 2025."""
    n = max(global_count(x.mask, reduce), 1)
    advantages, logp = x.advantages.double(), x.stats.logp.double()
    mean_a, mean_l = (exact_sum(v[x.mask], reduce) / n for v in (advantages, logp))
    return (advantages - mean_a) * (logp - mean_l)


def _share(frac: float, x: SelectionInputs, reduce: Reduce) -> int:
    """max(floor(frac N), 1) of the N response tokens; the slack keeps 0.29 * 100 from being 28."""
    return max(math.floor(frac * global_count(x.mask, reduce) + 1e-9), 1)


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
        drop = global_top_k(keys, candidates, x.seq_ids, x.positions, _share(self.frac, x, reduce), reduce)
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
        k = _share(self.frac, x, reduce)
        picked = global_top_k(advantage_covariance(x, reduce), x.mask, x.seq_ids, x.positions, k, reduce)
        share = torch.tensor(global_count(picked, reduce) / max(global_count(x.mask, reduce), 1))
        return self.coef * picked.to(zeros.dtype), zeros, {"selection/penalised_frac": share}


@dataclass(frozen=True, kw_only=True)
class Forking(Selection):
    """Only the max(floor(frac N), 1) tokens of highest entropy train. Wang et al. 2025b; Entropy Dynamics sec. 4.2."""

    statistics = ("entropy",)

    frac: float = 0.2
    """Share of the response tokens that trains."""

    def __post_init__(self) -> None:
        check_number("selection.frac", self.frac, 0, 1)

    def _keep(self, x: SelectionInputs, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        k = _share(self.frac, x, reduce)
        return global_top_k(x.stats.entropy, x.mask, x.seq_ids, x.positions, k, reduce), {}


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
        drop = _of_sign(x.advantages, self.advantage) & (chosen if self.mode == "drop" else ~chosen)
        return ~drop, {}

    def inside(self, x: LossInputs) -> Tensor:
        if not self.region.startswith("e"):
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


SELECTIONS: dict[str, type[Selection]] = {
    "none": Selection,
    "clip_b": ClipB,
    "clip_v": ClipV,
    "clip_cov": ClipCov,
    "kl_cov": KlCov,
    "forking": Forking,
    "region": Region,
    "entropy_bonus": EntropyBonus,
    "entropy_ratio": EntropyRatio,
    "unlikely": Unlikely,
}


@dataclass(frozen=True, kw_only=True)
class Composed(Selection):
    """Several selections at once: a token trains if all of them keep it, penalties and bonuses add up.

    Each selects from the whole batch, not from the tokens that the others keep. Metrics of all but the first carry the
    selection's name.
    """

    parts: tuple[tuple[str, Selection], ...]

    def needs(self) -> set[str]:
        return {name for _, part in self.parts for name in part.needs()}

    def select(self, x: SelectionInputs, reduce: Reduce | None = None) -> SelectionOutputs:
        outputs = [(name, part.select(x, reduce)) for name, part in self.parts]
        keep, first = x.mask, outputs[0][1]
        kl_coef, entropy_coef = torch.zeros_like(first.kl_coef), torch.zeros_like(first.entropy_coef)
        metrics = dict(first.metrics)
        for name, out in outputs:
            keep, kl_coef, entropy_coef = keep & out.keep, kl_coef + out.kl_coef, entropy_coef + out.entropy_coef
            if out is not first:
                metrics |= {k.replace("selection/", f"selection/{name}/"): v for k, v in out.metrics.items()}
        return SelectionOutputs(keep, kl_coef, entropy_coef, metrics)

    def inside(self, x: LossInputs) -> Tensor:
        return torch.stack([part.inside(x) for _, part in self.parts]).all(dim=0)

    def shape_rewards(self, rewards_B: Tensor, groups_B: Tensor, seq_logp_B: Tensor) -> Tensor:
        for _, part in self.parts:
            rewards_B = part.shape_rewards(rewards_B, groups_B, seq_logp_B)
        return rewards_B


def build_selection(name: str, *, also: Sequence[Mapping[str, Any]] = (), **params: Any) -> Selection:
    """The selection ``name`` with the fields of its dataclass.

    Args:
        also: further selections as ``{"name": ..., field: value, ...}``; ``per_update`` and ``renormalise`` are those
            of the first.
    Raises:
        ValueError: an unknown name, field or value.
    """
    first = _params.build("selection", SELECTIONS, name, params)
    if not also:
        return first
    parts = [(name, first)]
    for index, entry in enumerate(also):
        given = dict(entry) if isinstance(entry, Mapping) else {}
        own = str(given.pop("name", None))
        for key in ("per_update", "renormalise"):
            if key in given:
                raise ValueError(f"selection.also[{index}].{key}={given[key]!r}: set selection.{key}, for all of them.")
        parts.append((own, _params.build(f"selection.also[{index}]", SELECTIONS, own, given)))
    return Composed(per_update=first.per_update, renormalise=first.renormalise, parts=tuple(parts))
