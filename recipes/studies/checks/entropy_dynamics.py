"""Checks of Entropy Dynamics: lemma 1, theorems 1 and 2, corollaries 1 to 4.1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recipes.studies import theorems as t
from recipes.studies.checks.kinds import checks_of, first_order, identity, logits

PAPER = "Entropy Dynamics, 2602.03392"


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
    """Cor. 3 and 3.1 as one step: the expected first-order change over actions equals that of the mean step."""

    def make(seed: int) -> tuple[Tensor, t.FirstOrder]:
        z, advantages = logits(seed, 6), logits(seed + 100, 6)
        old = logits(seed + 50, 6) if off_policy else z
        ratio = (z.log_softmax(-1) - old.log_softmax(-1)).exp()
        pull = old.softmax(-1) * ratio * advantages
        return z, t.FirstOrder(pull - pull.sum() * z.softmax(-1), t.expected_token_slope(z, old, advantages))

    return make


def _batch(off_policy: bool, what: str) -> Callable[[int], float]:
    """Cor. 2, 2.1, 4 and 4.1 over all 3^3 batches of three tokens. Each token has its own policy and advantages."""

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
    """Cor. 4 taken literally: for one batch of three tokens, not in expectation."""
    z, advantages = logits(seed, 3, 3), logits(seed + 100, 3, 3)
    rows, actions = torch.arange(3), torch.arange(3)
    d, a = t.centred_discriminants(z)[rows, actions], advantages[rows, actions]
    return abs(float((a * d).mean() - ((a - a.mean()) * (d - d.mean())).mean()))


CHECKS = checks_of(
    PAPER,
    ("lemma 1", "delta p_i = eps p_i (1[i=k] - p_k)", "holds", identity(_lemma)),
    ("theorem 1", "raising one logit: Delta H = -eps S", "holds",
     first_order(lambda seed: (logits(seed, 5), t.single_logit(logits(seed, 5), 1)))),
    ("theorem 2", "a token's step: Delta H = -alpha (S - E_p[S])", "holds",
     first_order(lambda seed: (logits(seed, 5), t.single_token(logits(seed, 5), 1)))),
    ("theorem 1's slope for theorem 2's step", "a control: it must fail", "fails",
     first_order(_wrong_slope, order=1)),
    ("cor. 1", "E_k[S - E_p[S]] = 0", "holds", identity(_mean_factor(False))),
    ("cor. 1.1", "E_k[r (S - E_p[S])] = 0, off-policy", "holds", identity(_mean_factor(True))),
    ("cor. 2", "the batch mean of S - E_p[S] is 0", "holds in expectation",
     identity(_batch(False, "factor"), verdict="holds in expectation")),
    ("cor. 2.1", "the same off-policy", "holds in expectation",
     identity(_batch(True, "factor"), verdict="holds in expectation")),
    ("cor. 3", "E_k[Delta H] = -eta Cov(A, S - E_p[S])", "holds", first_order(_expected_change(False))),
    ("cor. 3.1", "E_k[Delta H] = -eta Cov(A, r (S - E_p[S])), off-policy", "holds",
     first_order(_expected_change(True))),
    ("cor. 4", "the batch's Delta H = -eta Cov_B(A, S - E_p[S]), sample covariance",
     "holds in expectation", identity(_batch(False, "covariance"), verdict="holds in expectation")),
    ("cor. 4.1", "the same off-policy", "holds in expectation",
     identity(_batch(True, "covariance"), verdict="holds in expectation")),
    ("cor. 4, one batch", "the same for a single batch", "fails", identity(_single_batch)),
)  # fmt: skip
