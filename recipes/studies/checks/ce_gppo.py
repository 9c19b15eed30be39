"""Checks of CE-GPPO: the covariance formula, the gradient of the loss, a step of the proof."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ext.rl.losses import build_loss
from megatron_ext.rl.types import LossInputs
from recipes.studies import theorems as t
from recipes.studies.checks.kinds import checks_of, drifted, first_order, identity, logits

PAPER = "CE-GPPO, 2509.20712"


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


CHECKS = checks_of(
    PAPER,
    ("eq. 7", "Delta H = -eta Cov(log pi, pi A), advantages centred under pi", "holds",
     first_order(_covariance_formula(0.0))),
    ("eq. 7, A not centred", "the same formula with A + 1, which is the same step", "fails",
     first_order(_covariance_formula(1.0), order=1)),
    ("eq. 10", "F is beta1 (1-eps), beta2 (1+eps) or r", "holds", identity(_gradient_of_ce_gppo)),
    ("eq. 23", "E[pi A] = E[A], a step of the proof of eq. 7", "fails", identity(_product_rule)),
)  # fmt: skip
