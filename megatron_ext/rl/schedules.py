"""Schedules and controllers: the parameters of a loss at rollout step k, open loop or from the measured entropy.

A `Controller` is pure: ``init`` gives a JSON-serialisable state, ``observe`` maps state and measurement to the next
state, ``loss_params`` gives the parameters for `build_loss` at this step. The state is part of the checkpoint; there is
no other memory. Within rollout step k: ``state = observe(state, ...)``, then
``build_loss(name, **{**config, **loss_params(state, ...)})``.

Sources: CE-GPPO fig. 4 for schedules of beta; Flexible Entropy Control sec. 4.2 for OD (ID and DID need the
step only and live in the loss `dynamic_clip`); Skywork-OR1 (He et al. 2025, arXiv:2505.22312) for
``adaptive_entropy_bonus``, by its code. Closed loops on the entropy came before ``entropy_target``: soft actor-critic's
temperature (Haarnoja et al. 2018, arXiv:1812.05905), Skywork-OR1's coefficient, and the PI control of EntroPIC (2025,
arXiv:2511.15248). Here the target is a curve, and the controlled quantity any coefficient of the loss.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from megatron_ext.rl import params as _params
from megatron_ext.rl.losses import LOSSES, build_loss
from megatron_ext.rl.losses.base import Actuator, Loss
from megatron_ext.rl.losses.dynamic_clip import hysteresis
from megatron_ext.rl.params import check_number, suggest

State = dict[str, Any]
Curve = Sequence[Sequence[float]]
"""[[step, value], ...] with rising steps, the first of which is 0."""


class Schedule(ABC):
    """Base of the schedules. Subclasses are frozen dataclasses whose fields are the schedule's parameters."""

    def init(self) -> State:
        return {}

    def observe(self, state: State, *, step: int, total_steps: int, entropy: float) -> State:
        return state

    @abstractmethod
    def values(self, state: State, base: Mapping[str, float], *, step: int) -> dict[str, float]:
        """Loss parameters that differ from the configured ones, ``base``."""

    def extremes(self, base: Mapping[str, float]) -> list[dict[str, float]]:
        """Settings to try when the run is configured, so that the loss cannot refuse any later step."""
        return []

    def metrics(self, state: State) -> dict[str, float]:
        return {}

    def warning(self, state: State) -> str | None:
        """A sentence for the user, at the step at which it becomes true."""
        return None


@dataclass(frozen=True, kw_only=True)
class NoSchedule(Schedule):
    """The configured parameters at every step."""

    def values(self, state: State, base: Mapping[str, float], *, step: int) -> dict[str, float]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Piecewise(Schedule):
    """Piecewise-constant parameters over rollout steps. CE-GPPO fig. 4: beta1 0 -> 0.5 at step 585, beta2 1."""

    points: Mapping[str, Curve] = field(default_factory=lambda: {"beta1": [[0, 0.0], [585, 0.5]]})
    """Loss parameter -> [[step, value], ...]: the value from that step on; the first step is 0."""

    def __post_init__(self) -> None:
        for key, curve in self.points.items():
            steps = [point[0] for point in curve if len(point) == 2]
            rising = all(a < b for a, b in zip(steps, steps[1:], strict=False))
            if len(steps) != len(curve) or not steps or steps[0] != 0 or not rising:
                raise ValueError(
                    f"schedule.points.{key}={[list(p) for p in curve]!r} is not a valid curve: "
                    "give [[0, value], [step, value], ...] with rising steps."
                )

    def values(self, state: State, base: Mapping[str, float], *, step: int) -> dict[str, float]:
        return {key: self._at(curve, step) for key, curve in self.points.items()}

    def _at(self, curve: Curve, step: int) -> float:
        return [value for start, value in curve if start <= step][-1]

    def extremes(self, base: Mapping[str, float]) -> list[dict[str, float]]:
        # a linear curve stays between its points, so trying the points is enough for both
        steps = {int(point[0]) for curve in self.points.values() for point in curve}
        return [self.values({}, base, step=step) for step in sorted(steps)]


@dataclass(frozen=True, kw_only=True)
class Linear(Piecewise):
    """Piecewise-linear parameters: interpolated between the points, constant after the last."""

    def _at(self, curve: Curve, step: int) -> float:
        return interpolate(curve, step)


def interpolate(curve: Curve, x: float) -> float:
    """The curve's value at x, linear between its points and constant after the last."""
    for (start, low), (end, high) in zip(curve, curve[1:], strict=False):
        if x <= end:
            return low + (high - low) * (x - start) / (end - start)
    return curve[-1][1]


@dataclass(frozen=True, kw_only=True)
class EntropyTarget(Schedule):
    """A PI controller that follows a target entropy H*(k) by moving coefficients within limits.

    Error e = (H* - H) / H_init. Control u = clip(gain e + I, -1, 1) and I += integral_gain e, but not while u is
    saturated in the direction of e (anti-windup). u = 0 is the configured value of every actuator, u = +1 the limit
    that raises entropy most, u = -1 the one that lowers it most; linear in between.
    """

    runtime = ("signs",)

    curve: Literal["constant", "linear", "cosine", "id", "did", "od"] = "constant"
    """constant | linear | cosine (start to end) | id (start, peak, end) | did (start, end, peak, end) | od: falls to
    ``end``, then up to the envelope end + (start - end)(1 - k/T), and so on (Flexible Entropy Control's hysteresis,
    as a target)."""
    start: float = 1.0
    """Target entropy at the first step."""
    end: float = 1.0
    """Target entropy at the last step."""
    peak: float = 1.2
    """id, did: entropy at the end of phase I."""
    relative: bool = True
    """start, end, peak are multiples of the first batch's entropy; else nats per token."""
    phase_ratio: float = 0.5
    """id, did: share of the steps in phase I; did reaches its minimum in the middle of it."""
    gain: float = 2.0
    """Proportional gain, applied to the relative error of the entropy."""
    integral_gain: float = 0.1
    """Integral gain, per rollout step."""
    limits: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Loss parameter -> [low, high], which must hold its configured value; empty: the loss's own (`Loss.actuators`).

    ``entropy_coef`` is the coefficient of an entropy bonus, configured value 0, with any loss."""
    signs: Mapping[str, int] = field(default_factory=dict)
    """Loss parameter -> +1 if raising it raises entropy, else -1; set by `build_controller` from `Loss.actuators`."""

    def __post_init__(self) -> None:
        for key in ("start", "end", "peak", "gain", "integral_gain"):
            check_number(f"schedule.{key}", getattr(self, key), 0)
        check_number("schedule.phase_ratio", self.phase_ratio, 0, 1, exclusive=True)

    def init(self) -> State:
        return {
            "target_h_init": None, "target": None, "target_up": 0, "integral": 0.0, "control": 0.0, "saturated": 0
        }  # fmt: skip

    def observe(self, state: State, *, step: int, total_steps: int, entropy: float) -> State:
        h_init = entropy if state["target_h_init"] is None else state["target_h_init"]
        scale = h_init if self.relative else 1.0
        start, end, peak = (scale * v for v in (self.start, self.end, self.peak))
        up = state["target_up"]
        if self.curve == "od":
            up = hysteresis(up, entropy, end, end + (start - end) * (1 - step / total_steps))
        target = self._target(step / total_steps, start, end, peak, up)
        error = (target - entropy) / max(h_init, 1e-8)
        raw = self.gain * error + state["integral"]
        winding_up = abs(raw) >= 1 and raw * error > 0
        integral = state["integral"] + (0.0 if winding_up else self.integral_gain * error)
        control = max(-1.0, min(1.0, raw))
        return {
            "target_h_init": h_init,
            "target": target,
            "target_up": up,
            "integral": integral,
            "control": control,
            "saturated": state["saturated"] + 1 if winding_up else 0,
        }

    def _target(self, x: float, start: float, end: float, peak: float, up: int) -> float:
        """H* at progress x in [0, 1], in the unit of its arguments."""
        if self.curve == "constant":
            return start
        if self.curve == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * x)) / 2
        if self.curve == "od":
            return end + (start - end) * (1 - x) if up else end
        phase = self.phase_ratio
        knots: dict[str, Curve] = {
            "linear": [(0, start), (1, end)],
            "id": [(0, start), (phase, peak), (1, end)],
            "did": [(0, start), (phase / 2, end), (phase, peak), (1, end)],
        }
        return interpolate(knots[self.curve], x)

    def values(self, state: State, base: Mapping[str, float], *, step: int) -> dict[str, float]:
        return self._actuate(state["control"], base)

    def _actuate(self, control: float, base: Mapping[str, float]) -> dict[str, float]:
        result = {}
        for key, (low, high) in self.limits.items():
            push = self.signs[key] * control
            result[key] = base[key] + push * ((high - base[key]) if push > 0 else (base[key] - low))
        return result

    def extremes(self, base: Mapping[str, float]) -> list[dict[str, float]]:
        for key, (low, high) in self.limits.items():
            if not low <= base[key] <= high:
                raise ValueError(
                    f"schedule.limits.{key}=[{low:g}, {high:g}] does not hold loss.{key}={base[key]:g}: "
                    "widen the limits or change the loss's value."
                )
        return [self._actuate(control, base) for control in (-1.0, 1.0)]

    def metrics(self, state: State) -> dict[str, float]:
        return {key: state[key] for key in ("target", "control", "integral", "saturated") if state[key] is not None}

    def warning(self, state: State) -> str | None:
        if state["saturated"] != PATIENCE:
            return None
        moved = ", ".join(f"{key} in [{low:g}, {high:g}]" for key, (low, high) in self.limits.items())
        return (
            f"the target entropy {state['target']:.3g} is out of reach: {moved} has been at the limit for {PATIENCE} "
            "steps; widen schedule.limits, add entropy_coef to them, or change the target"
        )


PATIENCE = 20
"""Steps at the limit, in the direction of the error, after which `EntropyTarget` warns."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveEntropyBonus(Schedule):
    """An entropy bonus whose coefficient steps up while the entropy is below a target, and down above it.

    c += delta if H < target else c -= delta, kept in [min_coef, max_coef]; the bonus acts only at steps with
    H < target. Skywork-OR1's `EntController`; TRL has the same with H <= target. H is the mean token entropy of the
    batch before its first update.
    """

    target: float = 0.2
    """Nats per token."""
    delta: float = 1e-4
    """Change of the coefficient per rollout step."""
    initial_coef: float = 0.0
    """Coefficient of the entropy bonus at the first step."""
    min_coef: float = 0.0
    """Smallest coefficient."""
    max_coef: float = 5e-3
    """Largest coefficient."""

    def __post_init__(self) -> None:
        check_number("schedule.target", self.target, 0)
        check_number("schedule.delta", self.delta, 0)
        check_number("schedule.max_coef", self.max_coef, self.min_coef)
        check_number("schedule.initial_coef", self.initial_coef, self.min_coef, self.max_coef)

    def init(self) -> State:
        return {"bonus_coef": self.initial_coef, "bonus_on": 1}

    def observe(self, state: State, *, step: int, total_steps: int, entropy: float) -> State:
        moved = state["bonus_coef"] + (self.delta if entropy < self.target else -self.delta)
        return {"bonus_coef": min(max(moved, self.min_coef), self.max_coef), "bonus_on": int(entropy < self.target)}

    def values(self, state: State, base: Mapping[str, float], *, step: int) -> dict[str, float]:
        return {ENTROPY_COEF: state["bonus_coef"] * state["bonus_on"]}

    def extremes(self, base: Mapping[str, float]) -> list[dict[str, float]]:
        return [{ENTROPY_COEF: value} for value in (self.min_coef, self.max_coef)]

    def metrics(self, state: State) -> dict[str, float]:
        return {"bonus_coef": state["bonus_coef"]}


@dataclass(frozen=True, kw_only=True)
class AutomaticTemperature(Schedule):
    """Soft actor-critic's automatic temperature: an entropy bonus whose coefficient grows while H is below a target.

    log c += rate (target - H), c kept in [min_coef, max_coef]: a gradient step on log c of the dual objective
    c (H - target), Haarnoja et al. 2018, arXiv:1812.05905, eq. 18, as its implementations take it (stable-baselines3,
    CleanRL, with Adam). H is the mean token entropy of the batch before its first update.
    """

    target: float = 0.2
    """Nats per token."""
    rate: float = 0.1
    """Change of log(coefficient) per nat and rollout step."""
    initial_coef: float = 1e-3
    """Coefficient before the first step."""
    min_coef: float = 1e-5
    """Smallest coefficient."""
    max_coef: float = 1e-2
    """Largest coefficient."""

    def __post_init__(self) -> None:
        check_number("schedule.target", self.target, 0)
        check_number("schedule.rate", self.rate, 0)
        check_number("schedule.min_coef", self.min_coef, 0, exclusive=True)
        check_number("schedule.max_coef", self.max_coef, self.min_coef)
        check_number("schedule.initial_coef", self.initial_coef, self.min_coef, self.max_coef)

    def init(self) -> State:
        return {"temperature": self.initial_coef}

    def observe(self, state: State, *, step: int, total_steps: int, entropy: float) -> State:
        log_coef = math.log(state["temperature"]) + self.rate * (self.target - entropy)
        low, high = math.log(self.min_coef), math.log(self.max_coef)
        return {"temperature": math.exp(min(max(log_coef, low), high))}

    def values(self, state: State, base: Mapping[str, float], *, step: int) -> dict[str, float]:
        return {ENTROPY_COEF: state["temperature"]}

    def extremes(self, base: Mapping[str, float]) -> list[dict[str, float]]:
        return [{ENTROPY_COEF: value} for value in (self.min_coef, self.max_coef)]

    def metrics(self, state: State) -> dict[str, float]:
        return {"temperature": state["temperature"]}


ENTROPY_COEF = "entropy_coef"
"""The one quantity besides the loss's parameters that a schedule can move: the coefficient of -H in the objective."""


SCHEDULES: dict[str, type[Schedule]] = {
    "none": NoSchedule,
    "piecewise": Piecewise,
    "linear": Linear,
    "entropy_target": EntropyTarget,
    "adaptive_entropy_bonus": AdaptiveEntropyBonus,
    "automatic_temperature": AutomaticTemperature,
}


@dataclass(frozen=True)
class Controller:
    """A loss's configuration and the schedule that moves it. Build with `build_controller`."""

    loss: Loss
    """As configured."""
    base: dict[str, Any]
    """Its parameters, defaults filled in, and ``entropy_coef``."""
    schedule: Schedule

    @property
    def reads_entropy(self) -> bool:
        """Whether anything that :meth:`observe` returns depends on the entropy."""
        return type(self.schedule).observe is not Schedule.observe or type(self.loss).observe is not Loss.observe

    def init(self) -> State:
        """State before the first step; JSON-serialisable."""
        return {"step": -1, "total_steps": 0, **self.schedule.init(), **self.loss.init_state()}

    def observe(self, state: State, *, step: int, total_steps: int, entropy: float) -> State:
        """The next state. Call once per rollout step, before its first update.

        Args:
            step: rollout step, 0 <= step <= total_steps, larger than at the last call.
            entropy: mean token entropy over this step's global batch, nats.
        Raises:
            ValueError: entropy is not a finite number >= 0.
        """
        check_number("entropy", entropy, 0, 1e6)
        assert step > state["step"], f"step {step} observed after step {state['step']}: each step is observed once"
        new = {**state, **self.schedule.observe(state, step=step, total_steps=total_steps, entropy=entropy)}
        new |= self.loss.observe(state, step=step, total_steps=total_steps, entropy=entropy)
        return {**new, "step": step, "total_steps": total_steps}

    def loss_params(self, state: State, *, step: int, total_steps: int) -> dict[str, Any]:
        """Parameters to merge over the configured ones for this step's `build_loss`."""
        moved = self.schedule.values(state, self.base, step=step)
        moved.pop(ENTROPY_COEF, None)
        return {**moved, **self.loss.at(state, step=step, total_steps=total_steps)}

    def entropy_coef(self, state: State, *, step: int) -> float:
        """Coefficient of an entropy bonus on every token, besides what the selection adds."""
        return self.schedule.values(state, self.base, step=step).get(ENTROPY_COEF, 0.0)

    def warning(self, state: State) -> str | None:
        """A sentence for the user, at the step at which it becomes true."""
        return self.schedule.warning(state)

    def metrics(self, state: State) -> dict[str, float]:
        """What was decided at the last observed step, for the log: every parameter moved and every state."""
        logged = dict(self.schedule.metrics(state))
        if state["step"] >= 0:
            logged |= self.schedule.values(state, self.base, step=state["step"])
        if "s" in state:
            logged["state"] = state["s"]
        return {f"schedule/{key}": float(value) for key, value in logged.items()}


def build_controller(
    loss_name: str, loss_params: Mapping[str, Any], schedule_name: str = "none", **schedule_params: Any
) -> Controller:
    """The controller for a configured loss. ``dynamic_clip`` with ``strategy=od`` brings OD's controller itself.

    Raises:
        ValueError: unknown names or parameters; a schedule that moves what the loss does not have; or one that would
            take a parameter out of its range at some step (all extremes are checked here).
    """
    given = {key: value for key, value in loss_params.items() if key != "name"}
    loss = build_loss(loss_name, **given)
    for key in sorted(given.keys() & set(loss.runtime)):
        raise ValueError(f"loss.{key}={given[key]!r} follows the rollout step by itself: leave it out.")
    base = {f.name: getattr(loss, f.name) for f in fields(loss) if f.name not in loss.runtime}  # type: ignore[arg-type]
    base[ENTROPY_COEF] = 0.0
    if schedule_name == "entropy_target":
        actuators = {**loss.actuators, ENTROPY_COEF: Actuator(+1)}
        limits = _limits(loss_name, actuators, schedule_params.get("limits"))
        signs = {key: actuator.sign for key, actuator in actuators.items()}
        schedule_params = {**schedule_params, "limits": limits, "signs": signs}
    schedule = _params.build("schedule", SCHEDULES, schedule_name, schedule_params)
    for key in getattr(schedule, "points", {}):
        _check_moves(f"schedule.points.{key}", key, loss_name, base)
    for settings in schedule.extremes(base):
        settings.pop(ENTROPY_COEF, None)
        build_loss(loss_name, **{**given, **settings})
    return Controller(loss, base, schedule)


def _limits(
    loss_name: str, known: Mapping[str, Actuator], limits: Mapping[str, Sequence[float]] | None
) -> dict[str, Sequence[float]]:
    """The configured limits, checked, or the loss's defaults."""
    if not limits and not any(actuator.limits for actuator in known.values()):
        losses = ", ".join(name for name, cls in LOSSES.items() if cls.actuators)
        raise ValueError(
            f"schedule.name='entropy_target' cannot steer loss.name={loss_name!r} by itself: give schedule.limits, "
            f"as in {{entropy_coef: [0, 0.005]}}, or choose one of {losses}."
        )
    for key, pair in (limits or {}).items():
        _check_moves(f"schedule.limits.{key}", key, loss_name, known)
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"schedule.limits.{key}={pair!r} must be an interval [low, high].")
    return dict(limits) if limits else {key: a.limits for key, a in known.items() if a.limits is not None}


def _check_moves(where: str, key: str, loss_name: str, known: Mapping[str, Any]) -> None:
    if key not in known:
        raise ValueError(f"{where} is not a parameter that loss.name={loss_name!r} has{suggest(key, known)}.")
