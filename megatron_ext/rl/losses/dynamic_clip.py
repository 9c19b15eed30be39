"""Dynamic clipping with the ID, DID and OD schedules. Source: Flexible Entropy Control sec. 4.

PPO whose offsets depend on the token's current probability p (detached, no gradient through a bound):
upper H(p) = alpha_high p + b_high, lower M(p) = alpha_low p + b_low, in place of the constant eps.

Resolutions. The printed phase-II lower bound of Flexible Entropy Control, (1+lambda) M - lambda eps, runs from M to
eps. Its text and figures say the opposite ("progressively transform the lower clipping threshold from eps_std to
M(p)"). ``lower_ramp=text`` (default) runs from eps to M, ``printed`` is the formula as printed. The step
k = phase_ratio * T belongs to phase I. App. E.3 (static thresholds in the same schedules) is alpha_high = alpha_low =
0, b_high = b_low = 0.28.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ext.rl.losses.base import Actuator, Loss, Terms
from megatron_ext.rl.losses.ppo import check_dual_clip, clipped_terms
from megatron_ext.rl.params import check_number
from megatron_ext.rl.types import LossInputs


@dataclass(frozen=True, kw_only=True)
class DynamicClip(Loss):
    """PPO's closed forms with eps_high(p), eps_low(p) = a mixture of eps and H(p), M(p) that `mixture` sets.

    ``step``, ``total_steps`` and ``state`` follow the rollout step (`at`) and cannot be configured.
    """

    runtime = ("step", "total_steps", "state")
    # A larger b_high admits rewarded tokens (entropy up), a larger b_low penalised ones (down); a more negative
    # alpha_high takes likely tokens (E1) away (up), a steeper alpha_low takes E3 away (down).
    actuators = MappingProxyType(
        {
            "b_high": Actuator(+1, (0.25, 0.75)),
            "b_low": Actuator(-1, (0.2, 0.4)),
            "alpha_high": Actuator(-1),
            "alpha_low": Actuator(+1),
        }
    )

    strategy: Literal["id", "did", "od", "upper", "lower", "both"] = "id"
    """id | did | od, or without a schedule: upper (H, eps), lower (eps, M), both (H, M)."""
    eps: float = 0.2
    """eps_std, the constant offset of the sides that are not dynamic."""
    alpha_high: float = -0.25
    """Slope of the upper offset H(p) = alpha_high p + b_high."""
    b_high: float = 0.5
    """Upper offset of a token with p = 0."""
    alpha_low: float = -0.13
    """Slope of the lower offset M(p) = alpha_low p + b_low."""
    b_low: float = 0.3
    """Lower offset of a token with p = 0."""
    phase_ratio: float = 0.5
    """Share of the steps in phase I, for id and did; studied: 0.3, 0.4, 0.5, 0.6."""
    lower_ramp: Literal["text", "printed"] = "text"
    """id, did: in phase II from eps to M (text, as the paper describes it) or from M to eps (printed, its formula)."""
    entropy_floor: float = 0.2
    """od: H_min as a share of the first batch's entropy."""
    initial_state: Literal[0, 1] = 0
    """od: s before the first switch (Flexible Entropy Control does not say): 0 suppress, 1 boost."""
    dual_clip: float | None = None
    """As in PPO: gradient 0 where A < 0 and r > dual_clip; None is off."""
    step: int | None = None
    """Rollout step k, 0 <= k <= total_steps; required by id and did."""
    total_steps: int | None = None
    state: Literal[0, 1] | None = None
    """od's s: 1 boost, 0 suppress; required by od."""

    def __post_init__(self) -> None:
        check_number("loss.eps", self.eps, 0, 1)
        check_dual_clip(self.dual_clip)
        check_number("loss.phase_ratio", self.phase_ratio, 0, 1, exclusive=True)
        check_number("loss.entropy_floor", self.entropy_floor, 0, 1)
        for side in ("high", "low"):
            alpha, b = getattr(self, f"alpha_{side}"), getattr(self, f"b_{side}")
            check_number(f"loss.b_{side}", b, 0)
            check_number(f"loss.alpha_{side}", alpha, -b)  # so that the offset is >= 0 for every p in [0, 1]
        if self.total_steps is not None:
            check_number("loss.total_steps", self.total_steps, 1)
            if self.step is not None:
                check_number("loss.step", self.step, 0, self.total_steps)

    def init_state(self) -> dict[str, Any]:
        return {"h_init": None, "s": self.initial_state} if self.strategy == "od" else {}

    def observe(self, state: Mapping[str, Any], *, step: int, total_steps: int, entropy: float) -> dict[str, Any]:
        if self.strategy != "od":
            return {}
        h_init = entropy if state["h_init"] is None else state["h_init"]
        h_min = self.entropy_floor * h_init
        high = h_min + (h_init - h_min) * (1 - step / total_steps)
        return {"h_init": h_init, "s": hysteresis(state["s"], entropy, h_min, high)}

    def at(self, state: Mapping[str, Any], *, step: int, total_steps: int) -> dict[str, Any]:
        return {"step": step, "total_steps": total_steps, "state": state.get("s")}

    def mixture(self) -> tuple[float, float]:
        """(share of H in the upper offset, share of M in the lower one), each in [0, 1]; the rest is eps.

        Raises:
            ValueError: id or did without ``step`` and ``total_steps``, od without ``state``.
        """
        if self.strategy == "od":
            if self.state is None:
                raise ValueError("loss.state=None: strategy=od needs the state of `observe`, 0 or 1.")
            return (1.0, 0.0) if self.state == 1 else (0.0, 1.0)
        if self.strategy in ("upper", "lower", "both"):
            return float(self.strategy != "lower"), float(self.strategy != "upper")
        if self.step is None or self.total_steps is None:
            raise ValueError(f"loss.step={self.step!r}: strategy={self.strategy} needs step and total_steps.")
        split = self.phase_ratio * self.total_steps
        if self.step <= split:
            u = self.step / split
            return (1 - u if self.strategy == "id" else u), 0.0
        u = (self.step - split) / (self.total_steps - split)
        return (0.0 if self.strategy == "id" else 1.0), (u if self.lower_ramp == "text" else 1 - u)

    def offsets(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """(eps_low(p), eps_high(p)) of shape (T,), for probabilities p of shape (T,)."""
        upper, lower = self.mixture()
        eps_high = (1 - upper) * self.eps + upper * (self.alpha_high * p + self.b_high)
        eps_low = (1 - lower) * self.eps + lower * (self.alpha_low * p + self.b_low)
        return eps_low, eps_high

    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        eps_low, eps_high = self.offsets(torch.exp(x.logp))
        terms = clipped_terms(x.advantages, ratio, 1 - eps_low, 1 + eps_high, self.dual_clip)
        return replace(terms, metrics={**terms.metrics, "eps_low_mean": eps_low, "eps_high_mean": eps_high})


def hysteresis(previous: int, entropy: float, low: float, high: float) -> int:
    """OD's state (Flexible Entropy Control sec. 4.2): 1 (boost) when H <= low, 0 (suppress) when H > high, else as
    before.
    """
    if entropy <= low:
        return 1
    return 0 if entropy > high else previous
