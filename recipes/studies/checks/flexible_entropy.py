"""Checks of Flexible Entropy Control: the gradient of entropy, its rule of thumb, E1 to E4, dynamic bounds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from recipes.studies import theorems as t
from recipes.studies.checks.kinds import ETA, checks_of, identity, logits, share
from recipes.studies.checks.own_weights import direction_is_autograd

PAPER = "Flexible Entropy Control, 2602.09782"


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
    """Share of tokens of a region, weighted by probability, whose step changes entropy as the paper says."""
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
    """Share of points that contradict eq. 8: pi <= (1 + b) / (1 - a pi_old) pi_old iff r <= 1 + a pi + b."""
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


CHECKS = checks_of(
    PAPER,
    ("eq. 4", "grad_z H = -p (log p + H)", "holds", identity(_gradient_of_entropy)),
    ("eq. 5", "<grad A log p_a, grad H> = -A (S_a - E_p[S])", "holds", identity(_alignment)),
    ("eq. 6", "sign of the change ~ -sign(A (log p + H)), without the baseline E_p[S]",
     "approximate", share(_sign_rule, 0.10, 0.22)),
    ("E1", "rewarding p > 0.7 lowers entropy", "holds", share(_region("e1"), 0.99, 1.0, "holds")),
    ("E2", "rewarding p <= 0.3 raises entropy", "approximate", share(_region("e2"), 0.5, 0.99)),
    ("E3", "penalising p > 0.7 raises entropy", "holds", share(_region("e3"), 0.99, 1.0, "holds")),
    ("E4", "penalising p <= 0.3 lowers entropy", "approximate", share(_region("e4"), 0.5, 0.99)),
    ("eq. 8", "pi <= (1+b)/(1-a pi_old) pi_old exactly where r <= 1 + a pi + b", "holds",
     identity(_bound_is_a_ratio_bound)),
    ("sec. 2.2", "|grad V| <= 2 H, rewards in [0, 1]", "holds",
     share(_value_gradient(1.0), 1.0, 1.0, "holds")),
    ("sec. 2.2", "the same bound with rewards 0 and 10", "approximate",
     share(_value_gradient(10.0), 0.0, 0.9)),
    ("moving upper bound", "the step of the loss with bound H(p) is the gradient with p detached",
     "holds", identity(direction_is_autograd({"name": "dynamic_clip", "strategy": "upper"}))),
    ("moving lower bound", "the same for M(p)",
     "holds", identity(direction_is_autograd({"name": "dynamic_clip", "strategy": "lower"}))),
)  # fmt: skip
