"""Gradient weights by autograd against closed forms in plain Python, in float64, at and around each bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.rl.losses import LOSSES, DifferentiableLoss, build_loss
from megatron_ext.rl.types import LossInputs

F64 = torch.float64
ENTROPY = 0.7  # nats, of every token in `evaluate`
INF = math.inf
FAR = [-40.0, -20.0, -5.0, -1.0, -0.05, 0.0, 0.05, 1.0, 5.0, 20.0, 40.0]
WeightOf = Callable[[float, float, float], float]  # (r, A, p) -> F


def ratio_of(log_r: float) -> float:
    """exp as torch computes it for one element."""
    return float(torch.tensor([log_r], dtype=F64).exp())


DUAL, STOP = ratio_of(1.1), ratio_of(1.4)  # bounds above e that exp yields exactly; below e it yields every double


def ppo_weight(low: float, high: float, dual: float = INF) -> WeightOf:
    def weight(r: float, a: float, p: float) -> float:
        if a > 0 and r > high or a < 0 and r < low or a < 0 and r > dual:
            return 0.0
        return r

    return weight


def ce_weight(
    b1: float, b2: float, low: float = 0.8, high: float = 1.2, stop: tuple[float, float] = (0, INF)
) -> WeightOf:
    def weight(r: float, a: float, p: float) -> float:
        if a < 0 and r < low:
            return 0.0 if r < stop[0] else b1 * low
        if a > 0 and r > high:
            return 0.0 if r > stop[1] else b2 * high
        return r

    return weight


def sapo_weight(r: float, a: float, p: float) -> float:
    z = (1.0 if a > 0 else 1.05) * (r - 1)
    return r / math.cosh(z / 2) ** 2 if z < 1000 else 0.0  # 4 sigma (1 - sigma) = 1 / cosh^2(z / 2)


def dynamic_weight(upper: float, lower: float) -> WeightOf:
    """``upper``, ``lower``: shares of Flexible Entropy Control's H(p) and M(p) in the offsets."""

    def weight(r: float, a: float, p: float) -> float:
        eps_high = 0.2 + upper * (-0.25 * p + 0.5 - 0.2)
        eps_low = 0.2 + lower * (-0.13 * p + 0.3 - 0.2)
        return ppo_weight(1 - eps_low, 1 + eps_high)(r, a, p)

    return weight


def aspo_weight(r: float, a: float, p: float) -> float:
    if a > 0:
        return 0.0 if r > 1 + 0.2 else min(1 / r, 3.0)
    return 0.0 if r < 1 - 0.2 else min(r, 3.0)


def dcpo_weight(r: float, a: float, p: float) -> float:
    """The authors' `get_clip_low_high` for the old probability q = p / r."""
    q = p / r
    low = (1 + math.sqrt(max(1 - 4 * 0.2 / q, 0.0))) / 2
    high = min((1 + math.sqrt(1 + 4 * 0.28 / q)) / 2, 10.0)
    return ppo_weight(low, high, 10.0)(r, a, p)


def repo_weight(r: float, a: float, p: float) -> float:
    return max(1 - 0.3 * math.copysign(1, a) * math.log(p), 0) * ppo_weight(1 - 0.2, 1 + 0.2)(r, a, p)


def shaped_weight(r: float, a: float, p: float) -> float:
    """A' / A times PPO's weight, at the entropy of `evaluate`."""
    bonus = min(0.4 * ENTROPY, abs(a) / 2)
    return (1 + bonus / a if a else 1.0) * ppo_weight(1 - 0.2, 1 + 0.2)(r, a, p)


def entropic_weight(r: float, a: float, p: float) -> float:
    extra = 0.5 * r * math.copysign(1, a) if p > 0.5 else 0.0
    return ppo_weight(1 - 0.2, 1 + 0.2, DUAL)(r, a, p) + extra


# id -> (loss, parameters, closed form, absolute bounds on r to test at and one ulp either side)
CASES: dict[str, tuple[str, dict[str, Any], WeightOf, list[float]]] = {
    "pg": ("pg", {}, lambda r, a, p: 1.0, [1.0]),
    "ppo": ("ppo", {}, ppo_weight(1 - 0.2, 1 + 0.2), [1 - 0.2, 1 + 0.2]),
    "ppo-dual": ("ppo", {"dual_clip": DUAL}, ppo_weight(1 - 0.2, 1 + 0.2, DUAL), [1 - 0.2, 1 + 0.2, DUAL]),
    "ppo-zero": ("ppo", {"eps_low": 0.0, "eps_high": 0.0}, ppo_weight(1.0, 1.0), [1.0]),
    "dapo": ("ppo", {"eps_high": 0.28}, ppo_weight(1 - 0.2, 1 + 0.28), [1 + 0.28]),
    "clip-lower": ("ppo", {"eps_low": 0.15, "eps_high": INF}, ppo_weight(1 - 0.15, INF), [1 - 0.15]),
    "no-clip": ("ppo", {"eps_low": 1, "eps_high": INF}, lambda r, a, p: r, [1.0]),
    "ce-1.5b": ("ce_gppo", {"beta1": 0.5, "beta2": 1.0}, ce_weight(0.5, 1.0), [1 - 0.2, 1 + 0.2]),
    "ce-7b": ("ce_gppo", {"beta1": 0.75, "beta2": 1.0}, ce_weight(0.75, 1.0), [1 - 0.2, 1 + 0.2]),
    "ce-swapped": ("ce_gppo", {"beta1": 1.0, "beta2": 0.5}, ce_weight(1.0, 0.5), [1 - 0.2, 1 + 0.2]),
    "ce-zero": ("ce_gppo", {"beta1": 0, "beta2": 0}, ppo_weight(1 - 0.2, 1 + 0.2), [1 - 0.2, 1 + 0.2]),
    "ce-asymmetric": (
        "ce_gppo",
        {"beta1": 0.6, "beta2": 0.9, "eps_low": 0.1, "eps_high": 0.3},
        ce_weight(0.6, 0.9, low=1 - 0.1, high=1 + 0.3),
        [1 - 0.1, 1 + 0.3],
    ),
    "ce-stops": (
        "ce_gppo",
        {"ratio_stop_low": 0.25, "ratio_stop_high": STOP},
        ce_weight(0.5, 1.0, stop=(0.25, STOP)),
        [0.25, 1 - 0.2, 1 + 0.2, STOP],
    ),
    "ce-stops-off": ("ce_gppo", {"ratio_stop_low": 0.0, "ratio_stop_high": INF}, ce_weight(0.5, 1.0), [1 - 0.2]),
    "ce-unbounded": (
        "ce_gppo",
        {"eps_low": 1.0, "eps_high": INF, "beta2": 0.0},
        ce_weight(0.5, 0.0, low=0.0, high=INF),
        [1.0],
    ),
    "ce-script": (
        "ce_gppo",
        {"dual_clip": DUAL},
        lambda r, a, p: 0.0 if a < 0 and r > DUAL else ce_weight(0.5, 1.0)(r, a, p),
        [1 - 0.2, 1 + 0.2, DUAL],
    ),
    "cispo": ("cispo", {}, lambda r, a, p: min(max(r, 1 - 0.2), 1 + 0.2), [1 - 0.2, 1 + 0.2]),
    "cispo-open": ("cispo", {"eps_low": 1, "eps_high": INF}, lambda r, a, p: r, [1.0]),
    "gspo": ("gspo", {}, ppo_weight(1 - 3e-4, 1 + 4e-4), [1 - 3e-4, 1 + 4e-4]),  # one token: s = r
    "gspo-dual": ("gspo", {"dual_clip": DUAL}, ppo_weight(1 - 3e-4, 1 + 4e-4, DUAL), [1 - 3e-4, DUAL]),
    "sapo": ("sapo", {}, sapo_weight, [1.0]),
    "aspo": ("aspo", {}, aspo_weight, [1 - 0.2, 1 + 0.2]),
    "bapo": ("bapo", {"dual_clip": DUAL}, ppo_weight(0.6, 1.2, DUAL), [0.6, 1.2, DUAL]),
    "dcpo": ("dcpo", {}, dcpo_weight, []),
    "gmpo": ("gmpo", {}, ppo_weight(math.exp(-0.4), math.exp(0.4)), []),  # one token: s = r
    "repo_r": ("repo_r", {"zeta": 0.3, "adaptive": False}, repo_weight, []),
    "entropy_shaped": ("entropy_shaped", {}, shaped_weight, [1 - 0.2, 1 + 0.2]),
    "entropic": ("entropic", {"control": 0.5, "likely": 0.5, "dual_clip": DUAL}, entropic_weight, []),
    "archer": ("archer", {"dual_clip": DUAL}, ppo_weight(1 - 0.2, 1 + 0.2, DUAL), [1 - 0.2, 1 + 0.2, DUAL]),
    "dynamic-upper": ("dynamic_clip", {"strategy": "upper"}, dynamic_weight(1, 0), []),
    "dynamic-lower": ("dynamic_clip", {"strategy": "lower"}, dynamic_weight(0, 1), []),
    "dynamic-both": ("dynamic_clip", {"strategy": "both"}, dynamic_weight(1, 1), []),
    "dynamic-dual": (
        "dynamic_clip",
        {"strategy": "both", "dual_clip": DUAL},
        lambda r, a, p: 0.0 if a < 0 and r > DUAL else dynamic_weight(1, 1)(r, a, p),
        [],
    ),
    "od-boost": ("dynamic_clip", {"strategy": "od", "state": 1}, dynamic_weight(1, 0), []),
    "od-suppress": ("dynamic_clip", {"strategy": "od", "state": 0}, dynamic_weight(0, 1), []),
    "id-start": ("dynamic_clip", {"strategy": "id", "step": 0, "total_steps": 8}, dynamic_weight(1, 0), []),
    "id-1/4": ("dynamic_clip", {"strategy": "id", "step": 2, "total_steps": 8}, dynamic_weight(0.5, 0), []),
    "id-end": ("dynamic_clip", {"strategy": "id", "step": 8, "total_steps": 8}, dynamic_weight(0, 1), []),
    "did-3/4": ("dynamic_clip", {"strategy": "did", "step": 6, "total_steps": 8}, dynamic_weight(1, 0.5), []),
}


def log_of(r: float) -> float:
    """An x with exp(x) == r exactly."""
    x = math.log(r)
    for _ in range(64):
        got = ratio_of(x)
        if got == r:
            return x
        x = math.nextafter(x, INF if got < r else -INF)
    raise AssertionError(f"no double has exp(x) == {r!r}")


def around(bound: float) -> list[float]:
    """Log-ratios at the bound, at the nearest ratio on either side that exp yields, and at two nearby points."""
    exact = log_of(bound)
    below, above = (math.log(math.nextafter(bound, to)) for to in (0, INF))
    while ratio_of(below) >= bound:
        below = math.nextafter(below, -INF)
    while ratio_of(above) <= bound:
        above = math.nextafter(above, INF)
    return [below, exact, above, exact - 1e-3, exact + 1e-3]


def dynamic_edges(weight: WeightOf, p: float) -> Iterator[float]:
    """Log-ratios just inside and outside a bound that depends on p, found by bisection of the closed form."""
    for a, inside, outside in ((1.0, 0.0, 3.0), (-1.0, 0.0, -3.0)):
        for _ in range(80):
            mid = (inside + outside) / 2
            inside, outside = (mid, outside) if weight(math.exp(mid), a, p) else (inside, mid)
        step = math.copysign(1e-12, outside)
        yield from (inside - step, outside + step)


def is_dynamic(case: str) -> bool:
    return CASES[case][0] in ("dynamic_clip", "dcpo", "repo_r", "entropic")


def log_ratios(case: str, p: float) -> list[float]:
    """Log-ratios to test: far out, and at, just inside and just outside every bound."""
    _, _, weight, bounds = CASES[case]
    return [*FAR, *(x for b in bounds for x in around(b)), *(dynamic_edges(weight, p) if is_dynamic(case) else ())]


GRID = [
    (case, p, a) for case in CASES for p in ((0.05, 0.6, 1.0) if is_dynamic(case) else (0.3,)) for a in (1.5, -0.7, 0)
]


def evaluate(name: str, params: dict[str, Any], logp: Tensor, old: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d logp) of one-token sequences."""
    logp = logp.clone().requires_grad_()
    ids = torch.arange(logp.numel())
    mask, entropy = torch.ones_like(ids).bool(), torch.full_like(a, ENTROPY)
    out = build_loss(name, **params)(LossInputs(logp, old, a, mask, ids, entropy))
    out.loss.sum().backward()
    return out.loss.detach(), logp.grad


@pytest.mark.parametrize(("case", "p", "a"), GRID)
def test_gradient_weight_is_the_closed_form(case: str, p: float, a: float) -> None:
    """One token at a time: vectorised exp may differ by an ulp, and the bounds are hit exactly."""
    name, params, weight, _ = CASES[case]
    for log_r in log_ratios(case, p):
        # where the bounds do not depend on p, old = 0 makes r exact (log-probabilities are not checked for sign)
        logp, old = (math.log(p), math.log(p) - log_r) if is_dynamic(case) else (log_r, 0.0)
        loss, grad = evaluate(name, params, *(torch.tensor([v], dtype=F64) for v in (logp, old, a)))
        expected = -weight(ratio_of(log_r), a, p) * a
        assert grad.item() == pytest.approx(expected, rel=1e-10, abs=1e-300), f"log r = {log_r!r}"
        assert torch.isfinite(loss).all() and loss.dtype == F64


def test_the_bounds_are_really_hit() -> None:
    """The grid must have a ratio equal to each bound, and neighbours on both sides of it."""
    hits = 0
    for case, (_, _, _, bounds) in CASES.items():
        ratios = [ratio_of(x) for x in log_ratios(case, 0.3)]
        for bound in bounds:
            assert bound in ratios
            assert any(bound * (1 - 1e-14) < r < bound for r in ratios)
            assert any(bound < r < bound * (1 + 1e-14) for r in ratios)
            hits += 1
    assert hits == sum(len(bounds) for _, _, _, bounds in CASES.values()) > 0


def textbook(case: str, logp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    """The objectives as printed in the papers, for differentiation by autograd. Per token, to be maximised."""
    r = (logp - old).exp()
    if case == "pg":
        return a * logp
    if case == "cispo":
        return r.clamp(0.8, 1.2).detach() * a * logp
    if case == "aspo":  # the authors' compute_policy_loss_archer with one interval for all tokens
        negative, positive = r.clamp(min=0.8), r.clamp(max=1.2)
        up = (positive / positive.detach()) / positive.detach() * a
        up = torch.where(1 / positive > 3, a * 3 * (logp - logp.detach() + 1), up)
        down = torch.where(negative > 3, a * 3 * (logp - logp.detach() + 1), negative * a)
        return torch.where(a < 0, down, up)
    if case == "entropy_shaped":  # the paper's printed code, before PPO's objective
        a = a + torch.min(0.4 * torch.full_like(a, ENTROPY), a.abs() / 2)
    if case == "entropic":  # the authors' compute_policy_loss_entropic
        likely = logp > math.log(0.5)
        ppo = torch.where(
            a < 0, torch.max(torch.min(r * a, r.clamp(0.8, 1.2) * a), DUAL * a), torch.min(r * a, r.clamp(0.8, 1.2) * a)
        )
        return ppo + 0.5 * torch.where(likely, r * a.abs(), 0.0)
    if case == "repo_r":
        rescaled = torch.where(
            a > 0, (a * (1 - 0.3 * logp.detach())).clamp(min=0), (a * (1 + 0.3 * logp.detach())).clamp(max=0)
        )
        return torch.min(r * rescaled, r.clamp(0.8, 1.2) * rescaled)
    if case == "sapo":
        tau = torch.where(a > 0, torch.tensor(1.0, dtype=F64), torch.tensor(1.05, dtype=F64))
        return torch.sigmoid(tau * (r - 1)) * 4 / tau * a
    if case.startswith("ce"):
        b1, b2 = {"ce-1.5b": (0.5, 1.0), "ce-7b": (0.75, 1.0), "ce-swapped": (1.0, 0.5)}[case]
        left, right = (r < 0.8) & (a < 0), (r > 1.2) & (a > 0)
        return torch.where(
            left, b1 * 0.8 / r.detach() * r * a, torch.where(right, b2 * 1.2 / r.detach() * r * a, r * a)
        )
    p = logp.exp().detach()
    eps = torch.full_like(p, 0.2)
    low, high = {
        "ppo": (eps, eps),
        "entropy_shaped": (eps, eps),
        "ppo-dual": (eps, eps),
        "dapo": (eps, eps + 0.08),
        "clip-lower": (eps - 0.05, eps + INF),
        "dynamic-both": (-0.13 * p + 0.3, -0.25 * p + 0.5),
        "id-1/4": (eps, 0.5 * (-0.25 * p + 0.5) + 0.5 * 0.2),
    }[case]
    objective = torch.min(r * a, torch.clamp(r, 1 - low, 1 + high) * a)
    if case == "ppo-dual":
        objective = torch.where(a < 0, torch.max(objective, DUAL * a), objective)
    return objective


TEXTBOOK = ["pg", "aspo", "cispo", "sapo", "ce-1.5b", "ce-7b", "ce-swapped", "ppo", "ppo-dual", "dapo", "clip-lower"]


@pytest.mark.parametrize("case", [*TEXTBOOK, "dynamic-both", "id-1/4", "entropy_shaped", "entropic", "repo_r"])
def test_value_and_gradient_are_those_of_the_textbook_objective(case: str) -> None:
    g = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(400, generator=g, dtype=F64)
    old = logp - torch.randn(400, generator=g, dtype=F64)
    a = torch.randn(400, generator=g, dtype=F64)
    name, params, _, _ = CASES[case]
    loss, grad = evaluate(name, params, logp, old, a)
    leaf = logp.clone().requires_grad_()
    objective = textbook(case, leaf, old, a)
    (-objective).sum().backward()
    torch.testing.assert_close(loss, -objective.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-12, atol=1e-14)


def random_inputs(seed: int, n: int, spread: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logp = -5 * torch.rand(n, generator=g, dtype=dtype)
    return logp, logp - spread * torch.randn(n, generator=g, dtype=dtype), torch.randn(n, generator=g, dtype=dtype)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 10), st.sampled_from([None, 1.0, 3.0]), st.floats(0.01, 30))
def test_beta_zero_is_ppo_bit_for_bit(
    seed: int, eps_low: float, eps_high: float, dual_clip: float | None, spread: float
) -> None:
    for dtype in (torch.float32, F64):
        clip = {"eps_low": eps_low, "eps_high": eps_high, "dual_clip": dual_clip}
        inputs = random_inputs(seed, 200, spread, dtype)
        _, ours = evaluate("ce_gppo", {"beta1": 0.0, "beta2": 0.0, **clip}, *inputs)
        _, ppo = evaluate("ppo", clip, *inputs)
        assert torch.equal(ours, ppo)


@settings(deadline=None, max_examples=100)
@given(st.floats(1e-6, 1), st.floats(1e-6, 1), st.floats(-1, 0), st.floats(0, 2))
def test_upper_bound_has_the_closed_form_of_p0_eq_8(p: float, p_old: float, alpha: float, b: float) -> None:
    """pi <= (1+b) / (1 - alpha pi_old) pi_old iff r <= 1 + alpha pi + b: checked by whether one with A > 0 trains."""
    alpha = max(alpha, -b)
    bound = (1 + b) / (1 - alpha * p_old) * p_old
    if abs(p - bound) < 1e-9 * bound:
        return  # rounding decides there
    params = {"strategy": "upper", "alpha_high": alpha, "b_high": b}
    inputs = (
        torch.tensor([math.log(p)], dtype=F64),
        torch.tensor([math.log(p_old)], dtype=F64),
        torch.ones(1).double(),
    )
    _, grad = evaluate("dynamic_clip", params, *inputs)
    assert (grad.item() != 0) == (p <= bound)


@pytest.mark.parametrize("k", range(9))
@pytest.mark.parametrize("strategy", ["id", "did"])
def test_schedules_follow_the_printed_formulas(strategy: str, k: int) -> None:
    """Flexible Entropy Control sec. 4.2 with lambda = 1 - 2k/T; in phase II the lower bound as its text has it, and as
    printed."""
    p, lam = 0.4, 1 - 2 * k / 8
    upper, lower = -0.25 * p + 0.5, -0.13 * p + 0.3
    for ramp in ("text", "printed"):
        loss = build_loss("dynamic_clip", strategy=strategy, step=k, total_steps=8, lower_ramp=ramp)
        low, high = loss.offsets(torch.tensor([p], dtype=F64))  # type: ignore[attr-defined]
        if k <= 4:
            want_high = lam * upper + (1 - lam) * 0.2 if strategy == "id" else lam * 0.2 + (1 - lam) * upper
            want_low = 0.2
        else:
            want_high = 0.2 if strategy == "id" else upper
            want_low = (1 + lam) * lower - lam * 0.2 if ramp == "printed" else (1 + lam) * 0.2 - lam * lower
        assert (low.item(), high.item()) == pytest.approx((want_low, want_high), abs=1e-14)


@pytest.mark.parametrize("ratio", [0.3, 0.4, 0.6])
def test_phase_ratio_moves_the_split(ratio: float) -> None:
    steps = 100
    for k in (0, round(ratio * steps), steps):
        loss = build_loss("dynamic_clip", strategy="id", step=k, total_steps=steps, phase_ratio=ratio)
        low, high = (v.item() for v in loss.offsets(torch.zeros(1, dtype=F64)))  # type: ignore[attr-defined]
        assert high == pytest.approx(0.5 if k == 0 else 0.2)
        assert low == pytest.approx(0.3 if k == steps else 0.2)


@pytest.mark.parametrize(
    ("strategy", "said"), [("id", "needs step and total_steps"), ("did", "needs step"), ("od", "needs the state")]
)
def test_a_schedule_without_its_clock_is_refused(strategy: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_loss("dynamic_clip", strategy=strategy).offsets(torch.zeros(1))  # type: ignore[attr-defined]


ANY = [
    (name, {"strategy": "both"} if name == "dynamic_clip" else {}) for name in LOSSES
]  # every loss with usable parameters


@pytest.mark.parametrize(("name", "params"), ANY, ids=list(LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_huge_ratios_stay_finite_and_are_counted(name: str, params: dict[str, Any], dtype: torch.dtype) -> None:
    log_r = torch.tensor([0.0, 40, 88, 89, 400, 1000, -40, -88, -104, -1000], dtype=dtype).repeat_interleave(2)
    logp = -log_r.abs() - 0.1
    a = torch.tensor([1.0, -1.0], dtype=dtype).repeat(10)
    loss, grad = evaluate(name, params, logp, logp - log_r, a)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all() and torch.isfinite(grad.double().square()).all()
    ids = torch.arange(20)
    x = LossInputs(logp, logp - log_r, a, torch.ones(20).bool(), ids, torch.full_like(a, ENTROPY))
    out = build_loss(name, **params)(x)
    beyond = 4 if dtype == torch.float32 else 2  # of the ten log-ratios: 88, 89, 400, 1000; or 400, 1000
    assert out.metrics["ratio_overflow"].item() == pytest.approx(beyond / 10)
    assert all(torch.isfinite(v) for v in out.metrics.values())


def test_a_capped_token_keeps_its_gradient() -> None:
    """No clamp of the log-ratio in the backward pass: beyond the cap a pessimistic token keeps its gradient."""
    _, grad = evaluate("ppo", {}, torch.tensor([-1.0]), torch.tensor([-101.0]), torch.tensor([-1.0]))
    assert grad.item() == pytest.approx(torch.finfo(torch.float32).max ** 0.5, rel=1e-5)


@pytest.mark.parametrize(("name", "params"), ANY, ids=list(LOSSES))
def test_masked_tokens_neither_count_nor_push(name: str, params: dict[str, Any]) -> None:
    logp, old, a = random_inputs(3, 6, 0.5, F64)
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    mask = torch.tensor([True, True, False, True, False, True])
    h = torch.rand(6, dtype=F64, generator=torch.Generator().manual_seed(4))
    kept = build_loss(name, **params)(LossInputs(logp[mask], old[mask], a[mask], mask[mask], ids[mask], h[mask]))
    nan = torch.where(mask, 0.0, math.nan).to(F64)
    leaf = (logp + nan).requires_grad_()
    out = build_loss(name, **params)(LossInputs(leaf, old + nan, a + nan, mask, ids, h + nan))
    out.loss.sum().backward()
    assert torch.equal(out.loss[mask].detach(), kept.loss) and (out.loss[~mask] == 0).all()
    assert (leaf.grad[~mask] == 0).all()
    assert torch.isfinite(leaf.grad).all()
    for key, value in out.metrics.items():
        assert value.item() == pytest.approx(kept.metrics[key].item(), rel=1e-12), key


@pytest.mark.parametrize("case", CASES)
def test_outputs_carry_the_gradient_and_the_events(case: str) -> None:
    """``gradient`` is autograd's, and ``below``/``above`` do not depend on the sign of the advantage."""
    name, params, _, _ = CASES[case]
    logp, old, a = random_inputs(11, 60, 0.6, F64)
    mask = torch.arange(60) % 5 != 0
    ids = torch.arange(60) // 4
    leaf = logp.clone().requires_grad_()
    x = LossInputs(leaf, old, a, mask, ids, torch.rand(60, dtype=F64, generator=torch.Generator().manual_seed(2)))
    out = build_loss(name, **params)(x)
    out.loss.sum().backward()
    assert torch.equal(out.gradient, -leaf.grad)
    flipped = build_loss(name, **params)(replace(x, logp=logp, advantages=-a))
    for event, other in ((out.below, flipped.below), (out.above, flipped.above)):
        assert torch.equal(event, other) and not event[~mask].any() and not event.requires_grad
    negative = out.below & (a < 0)
    if name in ("ppo", "ce_gppo", "gspo", "dynamic_clip"):
        assert out.metrics["pg_clipfrac_low"].item() == pytest.approx((negative.sum() / mask.sum()).item())
    if name in ("pg", "sapo"):
        assert not (out.below | out.above).any()


@dataclass(frozen=True, kw_only=True)
class Textbook(DifferentiableLoss):
    """Written as plain torch code, as a user would: PPO's objective and an entropy bonus."""

    eps: float = 0.2
    bonus: float = 0.0

    def objective(self, x: LossInputs) -> Tensor:
        r = (x.logp - x.old_logp).exp()
        objective = torch.min(r * x.advantages, r.clamp(1 - self.eps, 1 + self.eps) * x.advantages)
        return objective if x.entropy is None else objective + self.bonus * x.entropy.square()


def test_plain_differentiable_code_is_enough() -> None:
    """Same loss, gradient and ``LossOutputs.gradient`` as the closed form; the entropy gets its gradient too."""
    logp, old, a = random_inputs(12, 50, 0.6, F64)
    mask = torch.arange(50) % 4 != 0
    h = torch.rand(50, dtype=F64)
    x = LossInputs(logp.requires_grad_(), old, a, mask, entropy=h.requires_grad_())
    plain, closed = Textbook(bonus=0.3)(x), build_loss("ppo")(replace(x, entropy=None))
    torch.testing.assert_close(plain.loss.detach(), (closed.loss - mask * 0.3 * h.square()).detach())
    torch.testing.assert_close(plain.gradient, closed.gradient)
    weights = torch.rand(50, dtype=F64)
    got = torch.autograd.grad((weights * plain.loss).sum(), (logp, h))
    (want,) = torch.autograd.grad((weights * closed.loss).sum(), logp)
    torch.testing.assert_close(got[0], want)
    torch.testing.assert_close(got[1], torch.where(mask, -0.6 * weights * h, 0.0).detach())
    with torch.no_grad():  # evaluation: there is a loss without a gradient
        assert not Textbook()(x).loss.requires_grad


@pytest.mark.parametrize(("name", "params"), ANY, ids=list(LOSSES))
def test_empty_mask_and_no_tokens(name: str, params: dict[str, Any]) -> None:
    for n in (0, 3):
        logp = torch.full((n,), -1.0, requires_grad=True)
        out = build_loss(name, **params)(
            LossInputs(logp, torch.zeros(n), torch.ones(n), torch.zeros(n).bool(), torch.zeros(n).long(), torch.ones(n))
        )
        out.loss.sum().backward()
        assert (logp.grad == 0).all() and all(v.item() == 0 for v in out.metrics.values())


@pytest.mark.parametrize(("name", "params"), ANY, ids=list(LOSSES))
def test_half_precision_is_computed_in_float32_and_metrics_are_detached_scalars(name: str, params: Any) -> None:
    logp, old, a = random_inputs(5, 8, 0.5, torch.float32)
    h, mask, ids = torch.ones(8), torch.ones(8).bool(), torch.arange(8)
    half = LossInputs(logp.bfloat16().requires_grad_(), old, a, mask, ids, h)
    out = build_loss(name, **params)(half)
    assert out.loss.dtype == torch.float32 and out.loss.requires_grad
    wide = build_loss(name, **params)(LossInputs(logp.bfloat16().float(), old, a, mask, ids, h))
    assert torch.equal(out.loss.detach(), wide.loss)
    assert all(v.ndim == 0 and not v.requires_grad for v in out.metrics.values())


def test_clip_fractions_are_counted_apart() -> None:
    log_r = torch.tensor([0.5, 0.5, -0.5, -0.5, -0.5, 3.0, 3.0, 0.0], dtype=F64)
    a = torch.tensor([1.0, -1, -1, -1, 1, -1, 0, 1], dtype=F64)
    logp = torch.full((8,), -4.0, dtype=F64)
    out = build_loss("ppo", dual_clip=3.0)(LossInputs(logp, logp - log_r, a, torch.ones(8).bool()))
    fractions = [out.metrics[f"pg_clipfrac_{side}"].item() for side in ("low", "high", "dual")]
    assert fractions == [2 / 8, 1 / 8, 1 / 8]
    assert out.metrics["ppo_kl"].item() == pytest.approx(-log_r.mean().item())
    assert out.metrics["ratio_mean"].item() == pytest.approx(log_r.exp().mean().item())
    stops = build_loss("ce_gppo", ratio_stop_low=0.7, ratio_stop_high=2.0)
    metrics = stops(LossInputs(logp, logp - log_r, a, torch.ones(8).bool())).metrics
    assert (metrics["ratio_stop_frac_low"].item(), metrics["ratio_stop_frac_high"].item()) == (2 / 8, 0.0)


def gspo_inputs() -> LossInputs:
    """Five ragged sequences in shuffled order, ratios on both sides of the bounds, one token masked out."""
    g = torch.Generator().manual_seed(1)
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor([1, 7, 3, 12, 5]))
    ids = ids[torch.randperm(28, generator=g)]
    a = torch.tensor([1.0, -1, 1, -1, 0.5], dtype=F64)[ids]
    shift = torch.tensor([0.3, 0.3, -0.3, -0.3, 1e-4], dtype=F64)[ids]
    old = -torch.rand(28, generator=g, dtype=F64)
    noise = torch.randn(28, generator=g, dtype=F64) * 1e-6
    mask = torch.ones(28).bool()
    mask[4] = False
    return LossInputs(old + shift + noise, old, a, mask, ids)


def test_gspo_is_the_sequence_objective_under_seq_mean_token_mean() -> None:
    x = gspo_inputs()
    assert x.seq_ids is not None
    leaf = x.logp.clone().requires_grad_()
    loss = build_loss("gspo", eps_low=0.1, eps_high=0.2)(
        LossInputs(leaf, x.old_logp, x.advantages, x.mask, x.seq_ids)
    ).loss
    lengths = torch.bincount(x.seq_ids[x.mask], minlength=5)
    (loss / (5 * lengths[x.seq_ids])).sum().backward()
    other = x.logp.clone().requires_grad_()
    objective = torch.zeros((), dtype=F64)
    for i in range(5):
        tokens = (x.seq_ids == i) & x.mask
        s = (other - x.old_logp)[tokens].mean().exp()
        a = x.advantages[tokens][0]
        objective = objective + torch.min(s * a, s.clamp(0.9, 1.2) * a) / 5
    (-objective).backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-12, atol=1e-15)
    assert (leaf.grad[x.seq_ids == 0] == 0).all() and (leaf.grad[(x.seq_ids == 1) & x.mask] != 0).all()


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("cegppo", {}, "did you mean 'ce_gppo'"),
        ("ce_gppo", {"beta_1": 0.5}, "loss.beta_1=0.5 .*did you mean 'beta1'"),
        ("ce_gppo", {"beta1": -0.1}, r"loss.beta1=-0.1 .*\[0, inf\)"),
        ("ce_gppo", {"beta1": math.nan}, "loss.beta1"),
        ("ce_gppo", {"beta2": "1"}, "loss.beta2"),
        ("ce_gppo", {"ratio_stop_low": 0.9}, "loss.ratio_stop_low"),
        ("ce_gppo", {"ratio_stop_high": 1.1}, "loss.ratio_stop_high"),
        ("ppo", {"eps_low": 1.2}, r"loss.eps_low=1.2 .*\[0, 1\]"),
        ("ppo", {"eps_high": -0.1}, "loss.eps_high"),
        ("ppo", {"dual_clip": 0.5}, "loss.dual_clip"),
        ("ppo", {"eps_low": True}, "loss.eps_low=True"),
        ("sapo", {"tau_pos": 0}, "loss.tau_pos"),
        ("pg", {"eps_low": 0.2}, "loss.eps_low=0.2 is not a parameter of 'pg'.*takes none"),
        ("dynamic_clip", {"strategy": "ido"}, "did you mean 'id'"),
        ("dynamic_clip", {"strategy": "od", "state": 2}, "loss.state=2"),
        ("dynamic_clip", {"strategy": "id", "step": 9, "total_steps": 8}, "loss.step=9"),
        ("dynamic_clip", {"strategy": "both", "alpha_high": -0.6}, "loss.alpha_high"),
        ("dynamic_clip", {"strategy": "both", "phase_ratio": 1.0}, "loss.phase_ratio"),
    ],
)
def test_bad_parameters_are_named(name: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_loss(name, **params)


def test_bad_inputs_are_named() -> None:
    t, mask = torch.zeros(3), torch.ones(3).bool()
    with pytest.raises(ValueError, match=r"advantages has shape \(1,\)"):
        build_loss("ppo")(LossInputs(t, t, torch.ones(1), mask))
    with pytest.raises(ValueError, match="mask has dtype"):
        build_loss("ppo")(LossInputs(t, t, t, torch.ones(3)))
    with pytest.raises(ValueError, match=r"flatten the tokens"):
        build_loss("ppo")(LossInputs(t[None], t[None], t[None], mask[None]))
    with pytest.raises(ValueError, match="seq_ids is None"):
        build_loss("gspo")(LossInputs(t, t, t, mask))


def test_gmpo_is_verls_geometric_mean() -> None:
    """Value and gradient of (1/B) sum_i A_i exp(mean of the clipped log-ratios), written as verl writes it."""
    x = gspo_inputs()
    assert x.seq_ids is not None
    leaf = x.logp.clone().requires_grad_()
    out = build_loss("gmpo", log_eps_low=0.2, log_eps_high=0.25)(replace(x, logp=leaf))
    lengths = torch.bincount(x.seq_ids[x.mask], minlength=5)
    weights = (1 / (5 * lengths.double()))[x.seq_ids] * x.mask
    (weights * out.loss).sum().backward()
    other = x.logp.clone().requires_grad_()
    log_r, sign = other - x.old_logp, x.advantages.sign()
    bounded = sign * torch.min(sign * log_r, sign * log_r.clamp(-0.2, 0.25))
    sums = torch.zeros(5, dtype=F64).index_add(0, x.seq_ids[x.mask], bounded[x.mask])
    advantage = torch.zeros(5, dtype=F64).index_put((x.seq_ids,), x.advantages)
    objective = -(advantage * (sums / lengths).exp()).mean()
    objective.backward()
    torch.testing.assert_close((weights * out.loss).sum().detach(), objective.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-12, atol=1e-14)
    assert (leaf.grad == 0).any() and (leaf.grad[x.mask] != 0).any()


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.2, 4), st.floats(-0.5, 0.5))
def test_bapo_moves_its_bounds_until_the_target_is_met(seed: int, target: float, shift: float) -> None:
    """As in the authors' loop: the lower bound first, then the upper one, no further than needed."""
    logp, old, a = random_inputs(seed, 300, 0.5, F64)
    ratio, a = (logp - old).exp(), a + shift
    loss = build_loss("bapo", target=target)
    got = loss.fit(ratio, a)
    low, high = 0.6, 1.2

    def quotient(low: float, high: float) -> float:
        bounded = torch.where(a >= 0, ratio.clamp(max=high), ratio.clamp(min=low)) * a
        return float(bounded.clamp(min=0).sum() / -bounded.clamp(max=0).sum())

    while quotient(low, high) < target and low < 0.9:
        low = min(low + 0.05, 0.9)
    while quotient(low, high) < target and high < 3.0:
        high = min(high + 0.05, 3.0)
    assert (got.ratio_min, got.ratio_max) == (low, high)  # type: ignore[attr-defined]
    assert quotient(low, high) >= target or (low, high) == (0.9, 3.0)
    assert build_loss("ppo").fit(ratio, a) == build_loss("ppo")


@pytest.mark.parametrize("q", [0.0, 0.35, 0.8, 1.0])
def test_archer_widens_the_interval_above_the_quantile_of_each_response(q: float) -> None:
    """By `torch.nanquantile` over the rows, as in the authors' code; masked tokens do not count."""
    g = torch.Generator().manual_seed(5)
    h = torch.rand(4, 9, dtype=F64, generator=g)
    mask = torch.rand(4, 9, generator=g) < 0.7
    mask[3] = False
    ids = torch.arange(4)[:, None].expand(4, 9)
    quantiles = torch.nanquantile(torch.where(mask, h, math.nan), q, dim=1, keepdim=True)
    uncertain = (h > quantiles) & mask
    shuffled = torch.randperm(36, generator=g)
    flat = [v.flatten()[shuffled] for v in (h, mask, ids, uncertain)]
    for log_r, a in ((0.3, 1.0), (-0.3, -1.0)):  # between the two intervals
        logp = torch.full((36,), -1.0, dtype=F64)
        x = LossInputs(logp, logp - log_r, torch.full_like(logp, a), flat[1], flat[2], flat[0])
        out = build_loss("archer", quantile=q)(x)
        assert torch.equal(out.gradient != 0, flat[3])
        assert out.metrics["uncertain_frac"].item() == pytest.approx((uncertain.sum() / mask.sum()).item())


def test_losses_that_need_the_entropy_say_so() -> None:
    x = LossInputs(*(torch.zeros(3) for _ in range(3)), torch.ones(3).bool(), torch.zeros(3).long())
    for name in ("archer", "entropy_shaped"):
        with pytest.raises(ValueError, match="LossInputs.entropy is None"):
            build_loss(name)(x)
