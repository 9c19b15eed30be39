"""REPO-R: PPO with advantages rescaled by the log-probability. Source: Petrenko et al. 2026, arXiv:2603.11682.

Read in two descriptions of the paper's appendix D.2: a summary, and the documentation of SkyRL's implementation. The
general form is A - beta L with L = log pi centred; REPO-R takes beta = zeta |A| and log pi itself. Its controller
doubles |zeta| while the entropy is on the wrong side of the target, halves it on the other, keeps it in
[zeta_min, zeta_max] and changes the sign at zeta_min.
"""

from __future__ import annotations

import math
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
class RepoR(Loss):
    """PPO's closed forms for A' = A max(1 - sign(A) zeta log p, 0), log p of the current forward pass, detached.

    zeta > 0 strengthens unlikely rewarded tokens and weakens the penalty of unlikely ones: entropy rises.
    """

    actuators = CLIP_ACTUATORS
    runtime = ("current_zeta",)

    eps_low: float = 0.2
    """Lower offset; 1 switches clip-low off."""
    eps_high: float = 0.2
    """Upper offset; inf switches clip-high off."""
    dual_clip: float | None = None
    """Absolute upper bound on r for A < 0, >= 1; None is off."""
    zeta: float = 1e-3
    """Strength of the rescaling at the first rollout step; positive raises entropy, negative lowers it."""
    adaptive: bool = True
    """Whether the controller moves zeta once per rollout step."""
    target_entropy: float | None = None
    """Nats per token; None: the first batch's."""
    zeta_min: float = 1e-4
    """Smallest |zeta|, where the controller changes its sign."""
    zeta_max: float = 0.05
    """Largest |zeta|."""
    current_zeta: float | None = None
    """zeta of this rollout step; None: ``zeta``."""

    def __post_init__(self) -> None:
        check_offsets(self.eps_low, self.eps_high, self.dual_clip)
        check_number("loss.zeta_min", self.zeta_min, 0, exclusive=True)
        check_number("loss.zeta_max", self.zeta_max, self.zeta_min)
        check_number("loss.zeta", self.zeta)
        if self.adaptive:
            check_number("abs(loss.zeta)", abs(self.zeta), self.zeta_min, self.zeta_max)
        if self.target_entropy is not None:
            check_number("loss.target_entropy", self.target_entropy, 0)

    def init_state(self) -> dict[str, Any]:
        return {"zeta": self.zeta, "zeta_target": self.target_entropy} if self.adaptive else {}

    def observe(self, state: Mapping[str, Any], *, step: int, total_steps: int, entropy: float) -> dict[str, Any]:
        if not self.adaptive:
            return {}
        if state["zeta_target"] is None:  # the first batch defines the target, and there is nothing to correct yet
            return {"zeta_target": entropy}
        if entropy == state["zeta_target"]:
            return {}
        wanted = 1.0 if entropy < state["zeta_target"] else -1.0
        return {"zeta": self._moved(state["zeta"], wanted)}

    def _moved(self, zeta: float, wanted: float) -> float:
        """One step towards the sign ``wanted``: doubled if zeta has it, else halved, and turned over at zeta_min."""
        if zeta * wanted > 0:
            return math.copysign(min(2 * abs(zeta), self.zeta_max), wanted)
        half = abs(zeta) / 2
        return math.copysign(half, -wanted) if half >= self.zeta_min else math.copysign(self.zeta_min, wanted)

    def at(self, state: Mapping[str, Any], *, step: int, total_steps: int) -> dict[str, Any]:
        return {"current_zeta": state["zeta"]} if self.adaptive else {}

    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        zeta = self.zeta if self.current_zeta is None else self.current_zeta
        factor = (1 - zeta * x.advantages.sign() * x.logp).clamp(min=0)
        terms = clipped_terms(x.advantages * factor, ratio, 1 - self.eps_low, 1 + self.eps_high, self.dual_clip)
        metrics = {**terms.metrics, "repo_factor": factor, "repo_zeta": torch.full_like(factor, zeta)}
        return replace(terms, metrics=metrics)
