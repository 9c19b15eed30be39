"""Token selection: which tokens train, with what weight, and which get a penalty.

Composes with any loss and any schedule.

The learner's per-token loss is  keep * weight * loss + kl_coef * |logp - old_logp| - entropy_coef * H.

Whatever looks at the whole batch does so over the *global* batch, through an injected `Reduce`, from a statistics pass
with the weights in force before the update; the set is the same for any micro-batching or layout. "Batch" is the
rollout batch, selected once before its first update, or with ``per_update`` each mini-batch. Standard deviations are
population ones.
Sources: Entropy Dynamics alg. 1-2 and sec. 4.2, 5.2; Flexible Entropy Control sec. 3; CE-GPPO sec. 5.5;
Cui et al. 2025 (Clip-Cov, KL-Cov); Wang et al. 2025b (forking tokens); He et al. 2025 (unlikely);
Hao et al. 2025 (STEER).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.rl import params as _params
from megatron_ext.rl.global_stats import Reduce
from megatron_ext.rl.selection.base import Selection, SelectionInputs, SelectionOutputs
from megatron_ext.rl.selection.covariance import ClipCov, KlCov
from megatron_ext.rl.selection.rules import EntropyBonus, EntropyRatio, Region, Unlikely
from megatron_ext.rl.selection.scores import ClipB, ClipV, Forking, Steer
from megatron_ext.rl.types import LossInputs

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
    "steer": Steer,
}


@dataclass(frozen=True, kw_only=True)
class Composed(Selection):
    """Several selections at once: a token trains if all of them keep it, weights multiply, penalties add up.

    Each selects from the whole batch, not from the tokens that the others keep. Metrics of all but the first carry the
    selection's name.
    """

    parts: tuple[tuple[str, Selection], ...]

    def needs(self) -> set[str]:
        return {name for _, part in self.parts for name in part.needs()}

    def per_forward(self) -> bool:
        return any(part.per_forward() for _, part in self.parts)

    def select(self, x: SelectionInputs, reduce: Reduce | None = None) -> SelectionOutputs:
        outputs = [(name, part.select(x, reduce)) for name, part in self.parts]
        keep, first, weight = x.mask, outputs[0][1], None
        kl_coef, entropy_coef = torch.zeros_like(first.kl_coef), torch.zeros_like(first.entropy_coef)
        metrics = dict(first.metrics)
        for name, out in outputs:
            keep, kl_coef, entropy_coef = keep & out.keep, kl_coef + out.kl_coef, entropy_coef + out.entropy_coef
            if out.weight is not None:
                weight = out.weight if weight is None else weight * out.weight
            if out is not first:
                metrics |= {k.replace("selection/", f"selection/{name}/"): v for k, v in out.metrics.items()}
        return SelectionOutputs(keep, kl_coef, entropy_coef, metrics, weight)

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


__all__ = ["SELECTIONS", "Composed", "Selection", "SelectionInputs", "SelectionOutputs", "build_selection"]
