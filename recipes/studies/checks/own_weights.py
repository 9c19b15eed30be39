"""Checks of every loss with the gradient weight from its own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ext.rl.losses import build_loss
from megatron_ext.rl.types import LossInputs
from recipes.studies import theorems as t
from recipes.studies.checks.kinds import checks_of, drifted, first_order, logits
from recipes.studies.methods import BASELINE, FLEXIBLE, LOSSES


def with_own_weight(params: dict[str, Any]) -> Callable[[int], tuple[Tensor, t.FirstOrder]]:
    """The full-batch step of a loss over actions from pi_old, one advantage per action, with F from the code.

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


def direction_is_autograd(params: dict[str, Any]) -> Callable[[int], float]:
    """Difference of the direction of `with_own_weight` from autograd of PPO's objective with offsets of p."""

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


NAMES = (
    BASELINE, "REINFORCE", "clip-higher 0.28 (DAPO)", "Clip-Low (0.15, off)", "CE-GPPO (0.5, 1)", "CE-GPPO (1, 0.5)",
    "CISPO", "GSPO", "SAPO", "dynamic upper", "dynamic lower", "ID", "DID", "OD",
)  # fmt: skip

PAPER = "every loss, its own F"
STATEMENT = "Delta H = -eta E[F A (S - E_p[S])] with F read off the loss's code"

CHECKS = checks_of(
    PAPER,
    *[(name, STATEMENT, "holds", first_order(with_own_weight(dict((LOSSES | FLEXIBLE)[name].loss)))) for name in NAMES],
)
