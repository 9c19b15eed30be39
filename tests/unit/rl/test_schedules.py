"""Schedules and controllers: their values, their purity, and identical continuation of a resumed run."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.rl.losses import build_loss
from megatron_ext.rl.losses.dynamic_clip import hysteresis
from megatron_ext.rl.schedules import Controller, build_controller
from megatron_ext.rl.types import LossInputs

CONTROLLERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "none": ("ce_gppo", {"beta1": 0.75}, "none", {}),
    "piecewise": ("ce_gppo", {}, "piecewise", {"points": {"beta1": [[0, 0.0], [7, 0.5]]}}),
    "linear": ("ce_gppo", {}, "linear", {"points": {"beta1": [[0, 0.0], [10, 0.5]], "beta2": [[0, 1.0], [4, 0.8]]}}),
    "id": ("dynamic_clip", {"strategy": "id"}, "none", {}),
    "od": ("dynamic_clip", {"strategy": "od", "entropy_floor": 0.5}, "none", {}),
    "target-ce": ("ce_gppo", {}, "entropy_target", {"curve": "cosine", "end": 0.3}),
    "target-ppo": ("ppo", {}, "entropy_target", {"curve": "did", "end": 0.5, "peak": 0.9}),
    "target-od": ("dynamic_clip", {"strategy": "od"}, "entropy_target", {"curve": "od", "end": 0.5}),
    "repo_r": ("repo_r", {}, "none", {}),
    "entropic": ("entropic", {"target_entropy": 0.4}, "none", {}),
    "temperature": ("ce_gppo", {}, "automatic_temperature", {"target": 0.4}),
    "target-alpha": (
        "dynamic_clip",
        {"strategy": "both"},
        "entropy_target",
        {"limits": {"alpha_high": [-0.5, 0.0], "alpha_low": [-0.2, 0.0]}},
    ),
}


def make(case: str) -> Controller:
    loss, loss_params, schedule, params = CONTROLLERS[case]
    return build_controller(loss, loss_params, schedule, **params)


def entropies(seed: int, n: int) -> list[float]:
    noise = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    return [1.0, *(1.2 * x for x in noise)][:n]


@pytest.mark.parametrize("case", CONTROLLERS)
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6), st.integers(1, 19))
def test_resume_in_the_middle_continues_identically(case: str, seed: int, cut: int) -> None:
    steps = 20
    measured = entropies(seed, steps)

    def run(controller: Controller, state: dict[str, Any], start: int, stop: int) -> tuple[dict[str, Any], list[Any]]:
        trace = []
        for k in range(start, stop):
            before = copy.deepcopy(state)
            new = controller.observe(state, step=k, total_steps=steps, entropy=measured[k])
            assert state == before, "observe must not change the state it is given"
            state = new
            params = controller.loss_params(state, step=k, total_steps=steps)
            build_loss(CONTROLLERS[case][0], **{**CONTROLLERS[case][1], **params})
            trace.append((params, controller.metrics(state)))
        return state, trace

    whole_state, whole = run(make(case), make(case).init(), 0, steps)
    state, first = run(make(case), make(case).init(), 0, cut)
    resumed_state, second = run(make(case), json.loads(json.dumps(state)), cut, steps)
    assert first + second == whole and resumed_state == whole_state


def beta1_at(controller: Controller, step: int) -> float:
    return controller.loss_params(controller.init(), step=step, total_steps=1000)["beta1"]


def test_piecewise_is_p2_figure_4_by_default() -> None:
    controller = build_controller("ce_gppo", {"beta2": 1.0}, "piecewise")
    assert [beta1_at(controller, k) for k in (0, 584, 585, 999)] == [0.0, 0.0, 0.5, 0.5]


def test_linear_interpolates_and_then_stays() -> None:
    controller = build_controller("ce_gppo", {}, "linear", points={"beta1": [[0, 0.1], [10, 0.5], [20, 0.4]]})
    got = [beta1_at(controller, k) for k in (0, 5, 10, 15, 20, 999)]
    assert got == pytest.approx([0.1, 0.3, 0.5, 0.45, 0.4, 0.4], abs=1e-15)


def test_a_scheduled_beta_reaches_the_gradient() -> None:
    controller = build_controller("ce_gppo", {"eps_low": 0.2}, "piecewise", points={"beta1": [[0, 0.0], [3, 0.5]]})
    grads = []
    for k in (2, 3):
        logp = torch.tensor([-5.0], dtype=torch.float64, requires_grad=True)
        loss = build_loss("ce_gppo", **{"eps_low": 0.2, **controller.loss_params({}, step=k, total_steps=9)})
        loss(LossInputs(logp, logp.detach() + 1, -torch.ones(1).double(), torch.ones(1).bool())).loss.sum().backward()
        assert logp.grad is not None
        grads.append(logp.grad.item())
    assert grads == pytest.approx([0.0, 0.5 * 0.8])


def test_dynamic_clip_gets_its_clock() -> None:
    controller = build_controller("dynamic_clip", {"strategy": "id"})
    assert controller.loss_params(controller.init(), step=3, total_steps=9) == {
        "step": 3,
        "total_steps": 9,
        "state": None,
    }


@pytest.mark.parametrize(
    ("previous", "entropy", "expected"),
    [(0, 0.2, 1), (0, 0.21, 0), (1, 0.8, 1), (1, 0.81, 0), (0, 0.8, 0), (1, 0.2, 1)],
)
def test_hysteresis_at_its_thresholds(previous: int, entropy: float, expected: int) -> None:
    """Boost when H <= tau_low, suppress when H > tau_high, else as before (Flexible Entropy Control sec. 4.2)."""
    assert hysteresis(previous, entropy, 0.2, 0.8) == expected


def test_od_walks_through_a_hand_computed_run() -> None:
    """H_init 1, H_min 1/4, tau_high(k) = 1/4 + 3/4 (1 - k/8): 1, .90625, .8125, .71875, .625, .53125 ... exact."""
    controller = build_controller("dynamic_clip", {"strategy": "od", "entropy_floor": 0.25})
    state, seen = controller.init(), []
    for k, h in enumerate([1.0, 0.5, 0.25, 0.6, 0.625, 0.54, 0.3, 0.2, 0.4]):
        state = controller.observe(state, step=k, total_steps=8, entropy=h)
        seen.append(controller.loss_params(state, step=k, total_steps=8)["state"])
    assert seen == [0, 0, 1, 1, 1, 0, 0, 1, 0]
    assert state["h_init"] == 1.0 and controller.metrics(state)["schedule/state"] == 0.0


def test_od_initial_state_and_floor_are_configurable() -> None:
    controller = build_controller("dynamic_clip", {"strategy": "od", "initial_state": 1, "entropy_floor": 0.65})
    state = controller.observe(controller.init(), step=0, total_steps=10, entropy=2.0)
    assert state["s"] == 1
    state = controller.observe({**state, "s": 0}, step=1, total_steps=10, entropy=1.3)
    assert state["s"] == 1


def simulate(case: str, response: float, steps: int = 60, start: float = 1.0) -> list[dict[str, float]]:
    """Simulate entropy that decays by itself and rises with the actuation; return the logs of every step."""
    controller = make(case)
    state, h, log = controller.init(), start, []
    for k in range(steps):
        state = controller.observe(state, step=k, total_steps=steps, entropy=h)
        log.append({"h": h, **controller.metrics(state)})
        h = max(h + 0.02 * response * state["control"] - 0.008, 0.0)
    return log


def test_entropy_target_holds_the_target_where_the_open_loop_drifts_away() -> None:
    CONTROLLERS["hold"] = ("ce_gppo", {}, "entropy_target", {"curve": "constant", "integral_gain": 0.3})
    closed, open_loop = simulate("hold", 1.0, 200), simulate("hold", 0.0, 200)
    del CONTROLLERS["hold"]
    assert open_loop[-1]["h"] == 0.0 and abs(closed[-1]["h"] - 1.0) < 0.02
    assert closed[-1]["schedule/control"] == pytest.approx(0.4, abs=0.05)  # 0.02 u = 0.008


def test_integral_does_not_wind_up() -> None:
    """After 200 steps with a saturated actuator the control reverses within a few steps."""
    controller = build_controller("ce_gppo", {}, "entropy_target")
    state = controller.observe(controller.init(), step=0, total_steps=300, entropy=1.0)
    for k in range(1, 201):
        state = controller.observe(state, step=k, total_steps=300, entropy=0.2)
    assert state["control"] == 1.0 and abs(state["integral"]) <= 1.1
    state = controller.observe(state, step=201, total_steps=300, entropy=1.8)
    assert state["control"] < 0


@pytest.mark.parametrize(
    ("loss", "loss_params", "low_entropy"),
    [
        ("ce_gppo", {}, {"beta1": 0.0, "beta2": 1.0}),
        ("ppo", {}, {"eps_high": 0.4, "eps_low": 0.1}),
        ("dynamic_clip", {"strategy": "both"}, {"b_high": 0.75, "b_low": 0.2}),
    ],
)
def test_too_little_entropy_moves_each_parameter_to_the_limit_that_raises_it(
    loss: str, loss_params: dict[str, Any], low_entropy: dict[str, float]
) -> None:
    controller = build_controller(loss, loss_params, "entropy_target")
    state = controller.observe(controller.init(), step=0, total_steps=9, entropy=1.0)
    assert state["control"] == 0.0
    at_target = controller.loss_params(state, step=0, total_steps=9)
    assert {k: at_target[k] for k in low_entropy} == {
        k: getattr(build_default(loss, loss_params), k) for k in low_entropy
    }
    state = controller.observe(state, step=1, total_steps=9, entropy=0.1)
    got = controller.loss_params(state, step=1, total_steps=9)
    assert {k: got[k] for k in low_entropy} == pytest.approx(low_entropy)
    assert {k: v for k, v in controller.metrics(state).items() if k.split("/")[1] in low_entropy} == pytest.approx(
        {f"schedule/{k}": v for k, v in low_entropy.items()}
    )


def build_default(loss: str, params: dict[str, Any]) -> Any:
    return build_loss(loss, **params)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ("constant", [2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [2.0, 1.75, 1.5, 1.25, 1.0]),
        ("cosine", [2.0, 1.5 + math.sqrt(0.5) / 2, 1.5, 1.5 - math.sqrt(0.5) / 2, 1.0]),
        ("id", [2.0, 2.25, 2.5, 1.75, 1.0]),
        ("did", [2.0, 1.0, 2.5, 1.75, 1.0]),
    ],
)
def test_target_curves(curve: str, expected: list[float]) -> None:
    """start 2, end 1, peak 2.5 nats at k/T = 0, 1/4, 1/2, 3/4, 1; and the same in multiples of H_init = 0.5."""
    for relative, unit in ((False, 1.0), (True, 0.5)):
        controller = build_controller(
            "ce_gppo", {}, "entropy_target", curve=curve, start=2.0, end=1.0, peak=2.5, relative=relative
        )
        state, got = controller.init(), []
        for k in range(5):
            state = controller.observe(state, step=k, total_steps=4, entropy=0.5 if relative and k == 0 else 1.5 * unit)
            got.append(state["target"])
        assert got == pytest.approx([unit * v for v in expected])


def test_od_target_bounces_between_the_floor_and_the_falling_envelope() -> None:
    controller = build_controller("ce_gppo", {}, "entropy_target", curve="od", start=1.0, end=0.2)
    state, got = controller.init(), []
    for k, h in enumerate([1.0, 0.2, 0.5, 0.9, 0.5]):
        state = controller.observe(state, step=k, total_steps=10, entropy=h)
        got.append(state["target"])
    assert got == pytest.approx([0.2, 0.92, 0.84, 0.2, 0.2])


@pytest.mark.parametrize(
    ("loss", "loss_params", "schedule", "params", "said"),
    [
        ("ce_gppo", {}, "peacewise", {}, "did you mean 'piecewise'"),
        ("ce_gppo", {"beta": 1}, "none", {}, "loss.beta=1"),
        ("ce_gppo", {}, "linear", {"points": {"beta3": [[0, 1]]}}, "schedule.points.beta3.*did you mean 'beta"),
        ("ce_gppo", {}, "linear", {"points": {"beta1": [[5, 1.0]]}}, "schedule.points.beta1.*is not a valid curve"),
        ("ce_gppo", {}, "linear", {"points": {"beta1": [[0, 1.0], [0, 2.0]]}}, "is not a valid curve"),
        ("ce_gppo", {}, "linear", {"points": {"beta1": []}}, "is not a valid curve"),
        ("ce_gppo", {}, "piecewise", {"points": {"beta1": [[0, 1.0], [9, -1.0]]}}, "loss.beta1=-1.0"),
        ("dynamic_clip", {"strategy": "id"}, "piecewise", {"points": {"step": [[0, 1.0]]}}, "schedule.points.step"),
        ("gspo", {}, "entropy_target", {}, "cannot steer loss.name='gspo'"),
        ("ppo", {"eps_high": math.inf}, "entropy_target", {}, "schedule.limits.eps_high.*does not hold"),
        ("ce_gppo", {}, "entropy_target", {"limits": {"beta1": [0.0, 0.4]}}, "does not hold loss.beta1=0.5"),
        ("ce_gppo", {}, "entropy_target", {"limits": {"beta1": [0.0]}}, "must be an interval"),
        ("ce_gppo", {}, "entropy_target", {"limits": {"beta1": [-1.0, 1.0]}}, "loss.beta1=-1.0"),
        ("ce_gppo", {}, "entropy_target", {"curve": "sine"}, "schedule.curve"),
        ("ce_gppo", {}, "entropy_target", {"gain": -1.0}, "schedule.gain"),
    ],
)
def test_bad_schedules_are_refused_when_configured(
    loss: str, loss_params: dict[str, Any], schedule: str, params: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        build_controller(loss, loss_params, schedule, **params)


def test_bad_observations() -> None:
    controller = build_controller("dynamic_clip", {"strategy": "od"})
    with pytest.raises(ValueError, match="entropy=nan"):
        controller.observe(controller.init(), step=0, total_steps=5, entropy=math.nan)
    state = controller.observe(controller.init(), step=0, total_steps=5, entropy=1.0)
    with pytest.raises(AssertionError, match="observed once"):
        controller.observe(state, step=0, total_steps=5, entropy=1.0)


def test_the_adaptive_bonus_steps_as_skywork_or1() -> None:
    """`EntController`: up below the target, down at or above it, clipped, and switched off at or above it."""
    params = {"target": 0.2, "delta": 0.002, "max_coef": 0.005}
    controller = build_controller("ppo", {}, "adaptive_entropy_bonus", **params)
    state, seen = controller.init(), []
    for k, entropy in enumerate([0.1, 0.1, 0.1, 0.2, 0.3, 0.1]):
        state = controller.observe(state, step=k, total_steps=6, entropy=entropy)
        seen.append((controller.metrics(state)["schedule/bonus_coef"], controller.entropy_coef(state, step=k)))
        assert controller.loss_params(state, step=k, total_steps=6) == {}
    expected = [(0.002, 0.002), (0.004, 0.004), (0.005, 0.005), (0.003, 0.0), (0.001, 0.0), (0.003, 0.003)]
    assert [pytest.approx(x) for x in expected] == seen


def test_the_closed_loop_moves_an_entropy_bonus_with_any_loss_and_says_when_it_cannot_reach_the_target() -> None:
    limits = {"entropy_coef": [0.0, 0.01]}
    controller = build_controller("cispo", {}, "entropy_target", limits=limits, start=1.0, end=1.0, gain=4.0)
    state, warnings = controller.init(), []
    for k in range(40):
        state = controller.observe(state, step=k, total_steps=40, entropy=1.0 if k == 0 else 0.5)
        coef = controller.entropy_coef(state, step=k)
        assert coef == (0.0 if k == 0 else 0.01) and controller.loss_params(state, step=k, total_steps=40) == {}
        warnings.append(controller.warning(state))
    assert [bool(w) for w in warnings].count(True) == 1  # once, not at every step
    assert "out of reach" in str(warnings[20]) and "entropy_coef in [0, 0.01]" in str(warnings[20])
    with pytest.raises(ValueError, match="give schedule.limits"):
        build_controller("cispo", {}, "entropy_target")


def run_controller(controller: Controller, measured: list[float]) -> list[dict[str, Any]]:
    """The states after each observed entropy."""
    states, state = [], controller.init()
    for step, entropy in enumerate(measured):
        state = controller.observe(state, step=step, total_steps=len(measured), entropy=entropy)
        states.append(state)
    return states


def test_the_zeta_of_repo_r_doubles_halves_and_changes_sign_at_its_minimum() -> None:
    """The first batch is the target; its limits are the paper's."""
    controller = build_controller("repo_r", {"zeta": 4e-4})
    measured = [1.0, *[1.2] * 4, *[0.8] * 3, 1.0, *[0.8] * 12]
    zetas = [s["zeta"] for s in run_controller(controller, measured)]
    expected = [4e-4, 2e-4, 1e-4, -1e-4, -2e-4, -1e-4, 1e-4, 2e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3, 12.8e-3]
    assert zetas[:15] == pytest.approx(expected) and zetas[-3:] == [0.05] * 3
    params = controller.loss_params({"zeta": -0.01, "step": 0}, step=0, total_steps=9)
    assert params == {"current_zeta": -0.01}
    assert build_controller("repo_r", {"zeta": 0.3, "adaptive": False}).loss_params({}, step=0, total_steps=9) == {}


def test_the_alpha_of_entropic_is_proportional_and_integral() -> None:
    """alpha_t = k_p e_t + k_i (e_0 + ... + e_{t-1}), in [-1, 1], as the authors' actor accumulates."""
    controller = build_controller("entropic", {"target_entropy": 0.5, "k_p": 1.5, "k_i": 0.1})
    alphas = [s["alpha"] for s in run_controller(controller, [0.9, 0.4, 0.5, 3.0])]
    errors = [0.4, -0.1, 0.0, 2.5]
    assert alphas == pytest.approx([1.5 * e + 0.1 * sum(errors[:i]) for i, e in enumerate(errors[:3])] + [1.0])


def test_the_automatic_temperature_is_a_gradient_step_on_its_logarithm() -> None:
    """d/d log c of c (H - target), the dual objective, taken at c = 1 as its implementations do: H - target."""
    schedule = {"target": 0.3, "rate": 0.5, "initial_coef": 1e-3, "min_coef": 5e-4, "max_coef": 2e-3}
    controller = build_controller("ppo", {}, "automatic_temperature", **schedule)
    states = run_controller(controller, [0.1, 0.3, 0.5, 5.0, 0.0, *[0.0] * 20])
    first, *_, low, _ = [controller.entropy_coef(s, step=0) for s in states[:5]]
    assert first == pytest.approx(1e-3 * math.exp(0.1)) and low == pytest.approx(5e-4)
    assert [controller.entropy_coef(s, step=0) for s in states[1:3]] == pytest.approx([first, 1e-3])
    assert controller.entropy_coef(states[-1], step=0) == pytest.approx(2e-3)


@pytest.mark.parametrize("loss", ["ce_gppo", "gspo", "aspo", "dcpo", "archer", "repo_r", "entropic", "entropy_shaped"])
def test_the_closed_loop_moves_the_clip_offsets_of_any_loss_that_has_them(loss: str) -> None:
    """Only between the user's limits; the other parameters do not change."""
    base = build_loss(loss)
    low, high = base.eps_low, base.eps_high  # type: ignore[attr-defined]
    limits = {"eps_high": [high / 2, 2 * high], "eps_low": [low / 2, 2 * low], "entropy_coef": [0.0, 0.01]}
    controller = build_controller(loss, {}, "entropy_target", start=0.5, limits=limits)
    states = run_controller(controller, [1.0, 0.1])  # too high, then too low
    moved = [controller.loss_params(s, step=0, total_steps=9) for s in states]
    assert moved[0]["eps_high"] < high < moved[1]["eps_high"] and moved[0]["eps_low"] > low > moved[1]["eps_low"]
    assert [controller.entropy_coef(s, step=0) > 0 for s in states] == [False, True]
    assert set(moved[1]) - set(base.runtime) == {"eps_high", "eps_low"}
