"""EntroPIC: PI control of the entropy by the weights of likely tokens. Source: Yang et al. 2025, arXiv:2511.15248.

By the authors' code (``core_algos.py``, ``dp_actor.py``, ``run_entropic.sh``): with e = H - target,
alpha = clip(k_p e + k_i sum of earlier e, -1, 1). Departures: they measure H in every micro-batch, we once per rollout
step over the whole batch; and their extra term is averaged over the likely tokens alone, ours over all tokens (the
objective of a step has one denominator), which makes it smaller by the share of likely tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_ext.rl.losses.base import Loss, Terms
from megatron_ext.rl.losses.ppo import CLIP_ACTUATORS, check_offsets, clipped_terms
from megatron_ext.rl.params import check_number
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class Entropic(Loss):
    """PPO's closed forms, plus control * r |A| on tokens with p > likely: F A = F_ppo A + control r |A|.

    control > 0 weighs rewarded likely tokens more and penalised ones less, which lowers entropy; control < 0 raises it.
    """

    actuators = CLIP_ACTUATORS
    runtime = ("control",)

    eps_low: float = 0.2
    """Lower offset; 1 switches clip-low off."""
    eps_high: float = 0.2
    """Upper offset; inf switches clip-high off."""
    dual_clip: float | None = 3.0
    """As in PPO; the default of verl, in which the authors' code runs."""
    target_entropy: float = 0.1
    """Nats per token."""
    k_p: float = 1.0
    """Gain of the error H - target_entropy, per nat."""
    k_i: float = 0.01
    """Gain of the sum of earlier errors, per nat and rollout step."""
    likely: float = 0.95
    """Probability above which a token is weighed."""
    control: float = 0.0
    """alpha of this rollout step, in [-1, 1]."""

    def __post_init__(self) -> None:
        check_offsets(self.eps_low, self.eps_high, self.dual_clip)
        check_number("loss.target_entropy", self.target_entropy, 0)
        check_number("loss.k_p", self.k_p, 0)
        check_number("loss.k_i", self.k_i, 0)
        check_number("loss.likely", self.likely, 0, 1)
        check_number("loss.control", self.control, -1, 1)

    def init_state(self) -> dict[str, Any]:
        return {"error_sum": 0.0, "alpha": 0.0}

    def observe(self, state: Mapping[str, Any], *, step: int, total_steps: int, entropy: float) -> dict[str, Any]:
        error = entropy - self.target_entropy
        alpha = self.k_p * error + self.k_i * state["error_sum"]
        return {"error_sum": state["error_sum"] + error, "alpha": max(-1.0, min(1.0, alpha))}

    def at(self, state: Mapping[str, Any], *, step: int, total_steps: int) -> dict[str, Any]:
        return {"control": state["alpha"]}

    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        ppo = clipped_terms(x.advantages, ratio, 1 - self.eps_low, 1 + self.eps_high, self.dual_clip)
        likely = x.logp.exp() > self.likely
        extra = torch.where(likely, self.control * ratio * x.advantages.abs(), 0.0)
        metrics = {**ppo.metrics, "likely_frac": likely, "control": torch.full_like(ratio, self.control)}
        return replace(ppo, value=ppo.value + extra, gradient=ppo.gradient + extra, metrics=metrics)
