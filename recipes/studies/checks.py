"""Every theorem, corollary and approximation of the papers as a check that takes the step and measures.

Float64, tabular softmax, random policies drawn from fixed seeds. Three kinds:

* first order: a step is taken along a direction, the change of entropy is compared with the predicted slope. Right: the
  error is O(eta^2), so halving eta quarters it (order 2). Wrong: the error is O(eta) (order 1).
* identity: two sides that must be equal, to rounding.
* share: how often a rule of thumb or a condition holds.

Each check names what must come out, so that a result can contradict it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_ext.rl.losses import build_loss
from megatron_ext.rl.types import LossInputs
from recipes.studies import theorems as t
from recipes.studies.methods import BASELINE, FLEXIBLE, LOSSES

ETA = 1e-3
POLICIES = 20
FLEXIBLE_PAPER, CE, CLIP, DYNAMICS = (
    "Flexible Entropy Control, 2602.09782",
    "CE-GPPO, 2509.20712",
    "Clip-Low/Clip-High, 2509.26114",
    "Entropy Dynamics, 2602.03392",
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a check found."""

    verdict: str
    """holds | holds in expectation | approximate | fails"""
    measured: str
    """In numbers, for a reader."""
    order: float | None = None
    """Median residual order of a first-order check."""
    breaks_at: float | None = None
    """Step size at which the relative error of the prediction passes 10 % (median over policies)."""
    pairs: list[tuple[float, float]] = field(default_factory=list)
    """(predicted, measured) change of entropy at `ETA`."""
    errors: list[tuple[float, float]] = field(default_factory=list)
    """(eta, median relative error), for the chart."""


@dataclass(frozen=True, kw_only=True)
class Check:
    paper: str
    label: str
    statement: str
    expected: str
    """The verdict that the paper, read as `theorems` reads it, lets one expect."""
    run: Callable[[], Outcome]


def logits(seed: int, *shape: int, scale: float = 1.5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def drifted(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """(current, old) logits: the current policy is a few updates away from the one that sampled."""
    old = logits(seed, size)
    return old + logits(seed + 5000, size, scale=0.6), old


def randomly_rewarded(seed: int, scale: float) -> tuple[Tensor, Tensor]:
    """(current, old) over 30 actions: 16 clipped updates of 4 tokens from the old policy, each rewarded at random."""
    old = logits(seed, 30, scale=scale)
    generator = torch.Generator().manual_seed(seed + 7000)
    actions = torch.multinomial(old.softmax(-1), 64, replacement=True, generator=generator)
    signs = torch.randint(0, 2, (64,), generator=generator).double() * 2 - 1
    z = old.clone()
    for batch in torch.arange(64).split(4):
        ratio = (z.log_softmax(-1) - old.log_softmax(-1)).exp()[actions[batch]]
        sign = signs[batch]
        kept = ~(((sign > 0) & (ratio > 1.2)) | ((sign < 0) & (ratio < 0.8)))
        pull = torch.zeros_like(z).index_add_(0, actions[batch], kept * sign * ratio)
        z = z + 0.1 * (pull - pull.sum() * z.softmax(-1))
    return z, old


# --- kinds of checks ----------------------------------------------------------------------------------------------


def first_order(make: Callable[[int], tuple[Tensor, t.FirstOrder]], *, order: int = 2) -> Callable[[], Outcome]:
    """``make(seed)`` gives logits and a claim; ``order`` is what must come out (1 for a claim known to be wrong)."""

    def run() -> Outcome:
        orders, pairs, etas, breaks = [], [], [10.0**e for e in range(-5, 2)], []
        relative: list[list[float]] = [[] for _ in etas]
        for seed in range(POLICIES):
            z, claim = make(seed)
            if float(claim.direction.abs().max()) == 0:
                continue  # nothing is clipped in this draw
            orders.append(float(t.residual_order(z, claim, ETA)))
            change = _change(z, claim)
            pairs.append((ETA * float(claim.slope), change(ETA)))
            scale = max(abs(float(claim.slope)), 1e-12)
            for i, eta in enumerate(etas):
                relative[i].append(abs(change(eta) - eta * float(claim.slope)) / (eta * scale))
            breaks.append(_breaking_step(change, float(claim.slope)))
        median = _median(orders)
        good = abs(median - order) < 0.1
        verdict = "holds" if order == 2 and good else "fails"
        text = f"error falls with step size to the power {median:.2f} ({len(orders)} policies)"
        errors = [(eta, _median(values)) for eta, values in zip(etas, relative, strict=True)]
        return Outcome(
            verdict=verdict, measured=text, order=median, breaks_at=_median(breaks), pairs=pairs, errors=errors
        )

    return run


def _change(z: Tensor, claim: t.FirstOrder) -> Callable[[float], float]:
    before = t.entropy(z)
    return lambda eta: float(t.entropy(z + eta * claim.direction) - before)


def _breaking_step(change: Callable[[float], float], slope: float) -> float:
    """The first of the steps 1e-4 x 1.5^n whose prediction is off by more than 10 %."""
    eta = 1e-4
    while eta < 1e3 and abs(change(eta) - eta * slope) <= 0.1 * abs(eta * slope):
        eta *= 1.5
    return eta


def identity(
    error: Callable[[int], float], *, tolerance: float = 1e-12, verdict: str = "holds"
) -> Callable[[], Outcome]:
    """``error(seed)``: largest difference of the two sides."""

    def run() -> Outcome:
        worst = max(error(seed) for seed in range(POLICIES))
        found = verdict if worst < tolerance else "fails"
        return Outcome(verdict=found, measured=f"largest difference {worst:.1e} over {POLICIES} policies")

    return run


def share(
    count: Callable[[], tuple[float, str]], low: float, high: float, verdict: str = "approximate"
) -> Callable[[], Outcome]:
    """``count()``: a share in [0, 1] and what it is a share of; the verdict is for shares within [low, high]."""

    def run() -> Outcome:
        value, text = count()
        return Outcome(verdict=verdict if low <= value <= high else "fails", measured=f"{value:.1%} {text}")

    return run


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


# --- Flexible Entropy Control ---------------------------------------------------------------------------------------


def _gradient_of_entropy(seed: int) -> float:
    z = logits(seed, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(t.entropy(z), z)
    return float((gradient + t.discriminants(z.detach())).abs().max())


def _alignment(seed: int) -> float:
    z, worst = logits(seed, 7).requires_grad_(), 0.0
    (of_entropy,) = torch.autograd.grad(t.entropy(z), z)
    for action in range(7):
        (of_loss,) = torch.autograd.grad(-0.7 * z.log_softmax(-1)[action], z)
        worst = max(worst, abs(float(of_loss @ of_entropy - 0.7 * t.centred_discriminants(z.detach())[action])))
    return worst


def _sign_rule() -> tuple[float, str]:
    z = logits(2, 4000, 30)
    exact, rule = -t.centred_discriminants(z), -(z.log_softmax(-1) + t.entropy(z)[:, None])
    wrong = (z.softmax(-1) * (exact.sign() != rule.sign())).sum(-1).mean()
    return float(wrong), "of sampled tokens get the wrong sign (random softmax over 30 actions)"


def _region(region: str) -> Callable[[], tuple[float, str]]:
    """Share of E1..E4 tokens, by sampling probability, whose own step moves entropy as the paper says."""
    up, likely = region in ("e1", "e2"), region in ("e1", "e3")
    rises = region in ("e2", "e3")

    def count() -> tuple[float, str]:
        right = total = 0.0
        for seed in range(400):
            z = logits(seed, 12, scale=2.5)
            p = z.softmax(-1)
            for action in range(12):
                if not (p[action] > 0.7 if likely else p[action] <= 0.3):
                    continue
                step = ETA * (1 if up else -1) * t.single_token(z, action).direction
                grew = bool(t.entropy(z + step) > t.entropy(z))
                total += float(p[action])
                right += float(p[action]) * (grew == rises)
        return right / total, f"of sampled {region.upper()} tokens move entropy {'up' if rises else 'down'}"

    return count


def _bound_is_a_ratio_bound(seed: int) -> float:
    """Eq. 8: pi <= (1 + b) / (1 - a pi_old) pi_old if and only if r <= 1 + a pi + b; share of points that disagree."""
    generator = torch.Generator().manual_seed(seed)
    p, old = torch.rand(2, 20_000, generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    alpha, b = -0.25, 0.5
    closed = p - (1 + b) / (1 - alpha * old) * old
    ratio = p / old - (1 + alpha * p + b)
    return float(((closed > 0) != (ratio > 0))[ratio.abs() > 1e-12].double().mean())


def _value_gradient(scale: float) -> Callable[[], tuple[float, str]]:
    def count() -> tuple[float, str]:
        held = 0
        for seed in range(200):
            z = logits(seed, 6, scale=4.0)
            reward = scale * logits(seed + 999, 6).sigmoid().round()
            held += bool(t.value_gradient_norm(z, reward) <= 2 * t.entropy(z))
        return held / 200, f"of policies satisfy |grad V| <= 2 H with rewards 0 and {scale:g}"

    return count


# --- the losses' own gradient weight -----------------------------------------------------------------------------


def with_own_weight(params: dict[str, Any]) -> Callable[[int], tuple[Tensor, t.FirstOrder]]:
    """The full-batch step of a loss over actions from pi_old with advantages of their own, F taken from its code.

    Predicted: -sum_a pi_old(a) F_a A_a D_a. The direction is sum_a pi_old(a) F_a A_a (e_a - p).
    """
    runtime: dict[str, Any] = {"step": 3, "total_steps": 10} if params.get("strategy") in ("id", "did") else {}
    if params.get("strategy") == "od":
        runtime = {"state": 1}
    loss = build_loss(**params, **runtime)

    def make(seed: int) -> tuple[Tensor, t.FirstOrder]:
        z, old = drifted(seed)
        advantages = logits(seed + 9000, 8)
        x = LossInputs(
            logp=z.log_softmax(-1),
            old_logp=old.log_softmax(-1),
            advantages=advantages,
            mask=torch.ones(8, dtype=torch.bool),
            seq_ids=torch.arange(8),
        )
        pull = old.softmax(-1) * loss(x).gradient
        direction = pull - pull.sum() * z.softmax(-1)
        return z, t.FirstOrder(direction, -(pull * t.centred_discriminants(z)).sum())

    return make


def _direction_is_autograd(params: dict[str, Any]) -> Callable[[int], float]:
    """The direction of `with_own_weight` against autograd of the textbook objective of PPO with offsets of p."""

    def error(seed: int) -> float:
        z, claim = with_own_weight(params)(seed)
        _, old = drifted(seed)
        advantages = logits(seed + 9000, 8)
        leaf = z.clone().requires_grad_()
        p = leaf.softmax(-1)
        ratio, fixed = p / old.softmax(-1), p.detach()
        upper = 1 + (-0.25 * fixed + 0.5 if params["strategy"] == "upper" else 0.2)
        lower = 1 - (-0.13 * fixed + 0.3 if params["strategy"] == "lower" else 0.2)
        clipped = torch.minimum(torch.maximum(ratio, torch.as_tensor(lower)), torch.as_tensor(upper))
        objective = (old.softmax(-1) * torch.minimum(ratio * advantages, clipped * advantages)).sum()
        (gradient,) = torch.autograd.grad(objective, leaf)
        return float((gradient - claim.direction).abs().max())

    return error


# --- CE-GPPO ---------------------------------------------------------------------------------------------------------


def _covariance_formula(shift: float) -> Callable[[int], tuple[Tensor, t.FirstOrder]]:
    def make(seed: int) -> tuple[Tensor, t.FirstOrder]:
        z, advantages = logits(seed, 6), logits(seed + 100, 6)
        centred = advantages - (z.softmax(-1) * advantages).sum()
        return z, t.expected_gradient(z, centred + shift)

    return make


def _gradient_of_ce_gppo(seed: int) -> float:
    """Eq. 10 from the project's code against autograd of eq. 8 with its stop-gradient."""
    z, old = drifted(seed, 40)
    leaf = z.log_softmax(-1).requires_grad_()
    old_logp, advantages = old.log_softmax(-1), logits(seed + 9000, 40)
    ratio = (leaf - old_logp).exp()
    free = ratio / ratio.detach()
    value = torch.where(
        (ratio < 0.8) & (advantages < 0),
        0.5 * 0.8 * free,
        torch.where((ratio > 1.2) & (advantages > 0), 1.0 * 1.2 * free, ratio),
    )
    (gradient,) = torch.autograd.grad((value * advantages).sum(), leaf)
    loss = build_loss("ce_gppo", beta1=0.5, beta2=1.0)
    x = LossInputs(leaf.detach(), old_logp, advantages, torch.ones(40, dtype=torch.bool))
    return float((loss(x).gradient - gradient).abs().max())


def _product_rule(seed: int) -> float:
    """Eq. 23: E[pi A] = E[A]."""
    p, advantages = logits(seed, 6).softmax(-1), logits(seed + 100, 6)
    return abs(float((p * p * advantages).sum() - (p * advantages).sum()))


# --- Clip-Low / Clip-High --------------------------------------------------------------------------------------------


def _clipped(natural: bool, eps_low: float, eps_high: float) -> Callable[[int], tuple[Tensor, t.FirstOrder]]:
    make = t.clipped_natural_gradient if natural else t.clipped_gradient

    def claim(seed: int) -> tuple[Tensor, t.FirstOrder]:
        z, old = drifted(seed)
        return z, make(z, old, eps_low=eps_low, eps_high=eps_high, mu_nu=0.25)

    return claim


def _under_old(seed: int) -> tuple[Tensor, t.FirstOrder]:
    """Theorem 1 with p_k, q_k and E under pi_old, as X_k and Y_k are defined."""
    z, old = drifted(seed)
    low, high = t.clip_events(z, old, eps_low=0.2, eps_high=0.2)
    p_old, q = old.softmax(-1), t.discriminants(z)
    gap = (p_old * q).sum() - q
    claim = t.clipped_gradient(z, old, eps_low=0.2, eps_high=0.2)
    return z, t.FirstOrder(claim.direction, (p_old * low * gap).sum() - (p_old * high * gap).sum())


def _condition(side: str, natural: bool, scale: float = 3.0) -> Callable[[], tuple[float, str]]:
    """Share of policies, drifted by random rewards, in which the condition of theorem 1 (eq. 7) or 2 (eq. 8) holds."""

    def count() -> tuple[float, str]:
        held = total = 0
        for seed in range(200):
            z, old = randomly_rewarded(seed, scale)
            low, high = t.clip_events(z, old, eps_low=0.2, eps_high=0.2)
            event = low if side == "X" else high
            p, q = z.softmax(-1), t.discriminants(z)
            if float(event.sum()) == 0:
                continue
            score = -z.log_softmax(-1) - t.entropy(z) if natural else (p * q).sum() - q
            total += 1
            held += bool((p * event * score).sum() > 0)
        return (
            held / total,
            f"of {total} policies over 30 actions after 64 randomly rewarded tokens, where anything is clipped",
        )

    return count


# --- Entropy Dynamics ------------------------------------------------------------------------------------------------


def _lemma(seed: int) -> float:
    z = logits(seed, 6).requires_grad_()
    worst = 0.0
    for i in range(6):
        (row,) = torch.autograd.grad(z.softmax(-1)[i], z)
        p = z.detach().softmax(-1)
        expected = p[i] * (torch.nn.functional.one_hot(torch.tensor(i), 6) - p)
        worst = max(worst, float((row - expected).abs().max()))
    return worst


def _wrong_slope(seed: int) -> tuple[Tensor, t.FirstOrder]:
    z = logits(seed, 5)
    return z, t.FirstOrder(t.single_token(z, 1).direction, t.single_logit(z, 1).slope)


def _mean_factor(off_policy: bool) -> Callable[[int], float]:
    def error(seed: int) -> float:
        z = logits(seed, 9)
        old = logits(seed + 50, 9) if off_policy else z
        ratio = (z.log_softmax(-1) - old.log_softmax(-1)).exp()
        return abs(float((old.softmax(-1) * ratio * t.centred_discriminants(z)).sum()))

    return error


def _expected_change(off_policy: bool) -> Callable[[int], tuple[Tensor, t.FirstOrder]]:
    """Cor. 3 and 3.1 as one step: the expectation over actions of the first-order change is that of the mean step."""

    def make(seed: int) -> tuple[Tensor, t.FirstOrder]:
        z, advantages = logits(seed, 6), logits(seed + 100, 6)
        old = logits(seed + 50, 6) if off_policy else z
        ratio = (z.log_softmax(-1) - old.log_softmax(-1)).exp()
        pull = old.softmax(-1) * ratio * advantages
        return z, t.FirstOrder(pull - pull.sum() * z.softmax(-1), t.expected_token_slope(z, old, advantages))

    return make


def _batch(off_policy: bool, what: str) -> Callable[[int], float]:
    """Cor. 2, 2.1, 4, 4.1 over all 3^3 batches of three tokens, each with a policy and advantages of its own."""

    def error(seed: int) -> float:
        n = v = 3
        z, advantages = logits(seed, n, v), logits(seed + 100, n, v)
        old = logits(seed + 50, n, v) if off_policy else z
        rows = torch.arange(n)
        rd = (z.log_softmax(-1) - old.log_softmax(-1)).exp() * t.centred_discriminants(z)
        p = old.softmax(-1)
        if what == "factor":
            return abs(float(t.batch_expectation(p, lambda k: rd[rows, k].mean())))
        exact = t.batch_expectation(p, lambda k: -(advantages[rows, k] * rd[rows, k]).mean())

        def covariance(k: Tensor) -> Tensor:
            a, d = advantages[rows, k], rd[rows, k]
            return ((a - a.mean()) * (d - d.mean())).mean()

        return abs(float(exact + t.batch_expectation(p, covariance) * n / (n - 1)))

    return error


def _single_batch(seed: int) -> float:
    """Cor. 4 read literally, for one batch of three tokens and not in expectation."""
    z, advantages = logits(seed, 3, 3), logits(seed + 100, 3, 3)
    rows, actions = torch.arange(3), torch.arange(3)
    d, a = t.centred_discriminants(z)[rows, actions], advantages[rows, actions]
    return abs(float((a * d).mean() - ((a - a.mean()) * (d - d.mean())).mean()))


def _checks() -> list[Check]:
    rows: list[tuple[str, str, str, str, Callable[[], Outcome]]] = [
        (FLEXIBLE_PAPER, "eq. 4", "grad_z H = -p (log p + H)", "holds", identity(_gradient_of_entropy)),
        (FLEXIBLE_PAPER, "eq. 5", "<grad A log p_a, grad H> = -A (S_a - E_p[S])", "holds", identity(_alignment)),
        (FLEXIBLE_PAPER, "eq. 6", "sign of the change ~ -sign(A (log p + H)), without the baseline E_p[S]",
         "approximate", share(_sign_rule, 0.10, 0.22)),
        (FLEXIBLE_PAPER, "E1", "rewarding p > 0.7 lowers entropy", "holds", share(_region("e1"), 0.99, 1.0, "holds")),
        (FLEXIBLE_PAPER, "E2", "rewarding p <= 0.3 raises entropy", "approximate", share(_region("e2"), 0.5, 0.99)),
        (FLEXIBLE_PAPER, "E3", "penalising p > 0.7 raises entropy", "holds", share(_region("e3"), 0.99, 1.0, "holds")),
        (FLEXIBLE_PAPER, "E4", "penalising p <= 0.3 lowers entropy", "approximate", share(_region("e4"), 0.5, 0.99)),
        (FLEXIBLE_PAPER, "eq. 8", "pi <= (1+b)/(1-a pi_old) pi_old exactly where r <= 1 + a pi + b", "holds",
         identity(_bound_is_a_ratio_bound)),
        (FLEXIBLE_PAPER, "sec. 2.2", "|grad V| <= 2 H, rewards in [0, 1]", "holds",
         share(_value_gradient(1.0), 1.0, 1.0, "holds")),
        (FLEXIBLE_PAPER, "sec. 2.2", "the same bound with rewards 0 and 10", "approximate",
         share(_value_gradient(10.0), 0.0, 0.9)),
        (FLEXIBLE_PAPER, "moving upper bound", "the step of the loss with bound H(p) is the gradient with p detached",
         "holds", identity(_direction_is_autograd({"name": "dynamic_clip", "strategy": "upper"}))),
        (FLEXIBLE_PAPER, "moving lower bound", "the same for M(p)",
         "holds", identity(_direction_is_autograd({"name": "dynamic_clip", "strategy": "lower"}))),
        (CE, "eq. 7", "Delta H = -eta Cov(log pi, pi A), advantages centred under pi", "holds",
         first_order(_covariance_formula(0.0))),
        (CE, "eq. 7, A not centred", "the same formula with A + 1, which is the same step", "fails",
         first_order(_covariance_formula(1.0), order=1)),
        (CE, "eq. 10", "F is beta1 (1-eps), beta2 (1+eps) or r", "holds", identity(_gradient_of_ce_gppo)),
        (CE, "eq. 23", "E[pi A] = E[A], a step of the proof of eq. 7", "fails", identity(_product_rule)),
        (CLIP, "theorem 1", "clipping bias of the policy gradient, E under pi_k", "holds",
         first_order(_clipped(False, 0.2, 0.2))),
        (CLIP, "theorem 1, clip-high off", "only the clip-low term", "holds",
         first_order(_clipped(False, 0.05, math.inf))),
        (CLIP, "theorem 1, clip-low off", "only the clip-high term", "holds", first_order(_clipped(False, 1.0, 0.1))),
        (CLIP, "theorem 1, E under pi_old", "the expectations read as the events are defined", "fails",
         first_order(_under_old, order=1)),
        (CLIP, "theorem 2", "the same for the natural policy gradient", "holds", first_order(_clipped(True, 0.2, 0.2))),
        (CLIP, "eq. 7, X", "E[Q] - E[Q|X] > 0", "approximate", share(_condition("X", False), 0.8, 1.0)),
        (CLIP, "eq. 7, Y", "E[Q] - E[Q|Y] > 0", "approximate", share(_condition("Y", False), 0.65, 1.0)),
        (CLIP, "eq. 7, Y, flat policies", "the same from logits half as large", "approximate",
         share(_condition("Y", False, 1.5), 0.4, 0.8)),
        (CLIP, "eq. 8, X", "E[-log pi | X] - H > 0", "approximate", share(_condition("X", True), 0.7, 1.0)),
        (CLIP, "eq. 8, Y", "E[-log pi | Y] - H > 0", "approximate", share(_condition("Y", True), 0.55, 1.0)),
        (DYNAMICS, "lemma 1", "delta p_i = eps p_i (1[i=k] - p_k)", "holds", identity(_lemma)),
        (DYNAMICS, "theorem 1", "raising one logit: Delta H = -eps S", "holds",
         first_order(lambda seed: (logits(seed, 5), t.single_logit(logits(seed, 5), 1)))),
        (DYNAMICS, "theorem 2", "a token's step: Delta H = -alpha (S - E_p[S])", "holds",
         first_order(lambda seed: (logits(seed, 5), t.single_token(logits(seed, 5), 1)))),
        (DYNAMICS, "theorem 1's slope for theorem 2's step", "a control: it must fail", "fails",
         first_order(_wrong_slope, order=1)),
        (DYNAMICS, "cor. 1", "E_k[S - E_p[S]] = 0", "holds", identity(_mean_factor(False))),
        (DYNAMICS, "cor. 1.1", "E_k[r (S - E_p[S])] = 0, off-policy", "holds", identity(_mean_factor(True))),
        (DYNAMICS, "cor. 2", "the batch mean of S - E_p[S] is 0", "holds in expectation",
         identity(_batch(False, "factor"), verdict="holds in expectation")),
        (DYNAMICS, "cor. 2.1", "the same off-policy", "holds in expectation",
         identity(_batch(True, "factor"), verdict="holds in expectation")),
        (DYNAMICS, "cor. 3", "E_k[Delta H] = -eta Cov(A, S - E_p[S])", "holds", first_order(_expected_change(False))),
        (DYNAMICS, "cor. 3.1", "E_k[Delta H] = -eta Cov(A, r (S - E_p[S])), off-policy", "holds",
         first_order(_expected_change(True))),
        (DYNAMICS, "cor. 4", "the batch's Delta H = -eta Cov_B(A, S - E_p[S]), sample covariance",
         "holds in expectation", identity(_batch(False, "covariance"), verdict="holds in expectation")),
        (DYNAMICS, "cor. 4.1", "the same off-policy", "holds in expectation",
         identity(_batch(True, "covariance"), verdict="holds in expectation")),
        (DYNAMICS, "cor. 4, one batch", "the same for a single batch", "fails", identity(_single_batch)),
    ]  # fmt: skip
    checks = [Check(paper=p, label=x, statement=s, expected=e, run=r) for p, x, s, e, r in rows]
    for name in _WEIGHTED:
        method = (LOSSES | FLEXIBLE)[name]
        checks.append(
            Check(
                paper="every loss, its own F",
                label=name,
                statement="Delta H = -eta E[F A (S - E_p[S])] with F read off the loss's code",
                expected="holds",
                run=first_order(with_own_weight(dict(method.loss))),
            )
        )
    return checks


_WEIGHTED = (
    BASELINE, "REINFORCE", "clip-higher 0.28 (DAPO)", "Clip-Low (0.15, off)", "CE-GPPO (0.5, 1)", "CE-GPPO (1, 0.5)",
    "CISPO", "GSPO", "SAPO", "dynamic upper", "dynamic lower", "ID", "DID", "OD",
)  # fmt: skip

CHECKS = _checks()
