"""Checks of Clip-Low/Clip-High: theorems 1 and 2, and how often their conditions hold."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from recipes.studies import theorems as t
from recipes.studies.checks.kinds import checks_of, drifted, first_order, logits, share

PAPER = "Clip-Low/Clip-High, 2509.26114"


def randomly_rewarded(seed: int, scale: float) -> tuple[Tensor, Tensor]:
    """(current, old) logits over 30 actions, after 16 clipped updates of 4 randomly rewarded tokens."""
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


def _clipped(natural: bool, eps_low: float, eps_high: float) -> Callable[[int], tuple[Tensor, t.FirstOrder]]:
    make = t.clipped_natural_gradient if natural else t.clipped_gradient

    def claim(seed: int) -> tuple[Tensor, t.FirstOrder]:
        z, old = drifted(seed)
        return z, make(z, old, eps_low=eps_low, eps_high=eps_high, mu_nu=0.25)

    return claim


def _under_old(seed: int) -> tuple[Tensor, t.FirstOrder]:
    """Theorem 1 with p_k, q_k and E under pi_old, following the definition of X_k and Y_k."""
    z, old = drifted(seed)
    low, high = t.clip_events(z, old, eps_low=0.2, eps_high=0.2)
    p_old, q = old.softmax(-1), t.discriminants(z)
    gap = (p_old * q).sum() - q
    claim = t.clipped_gradient(z, old, eps_low=0.2, eps_high=0.2)
    return z, t.FirstOrder(claim.direction, (p_old * low * gap).sum() - (p_old * high * gap).sum())


def _condition(side: str, natural: bool, scale: float = 3.0) -> Callable[[], tuple[float, str]]:
    """Share of randomly rewarded policies for which the condition of theorem 1 (eq. 7) or 2 (eq. 8) holds."""

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


CHECKS = checks_of(
    PAPER,
    ("theorem 1", "clipping bias of the policy gradient, E under pi_k", "holds",
     first_order(_clipped(False, 0.2, 0.2))),
    ("theorem 1, clip-high off", "only the clip-low term", "holds",
     first_order(_clipped(False, 0.05, math.inf))),
    ("theorem 1, clip-low off", "only the clip-high term", "holds", first_order(_clipped(False, 1.0, 0.1))),
    ("theorem 1, E under pi_old", "the expectations read as the events are defined", "fails",
     first_order(_under_old, order=1)),
    ("theorem 2", "the same for the natural policy gradient", "holds", first_order(_clipped(True, 0.2, 0.2))),
    ("eq. 7, X", "E[Q] - E[Q|X] > 0", "approximate", share(_condition("X", False), 0.8, 1.0)),
    ("eq. 7, Y", "E[Q] - E[Q|Y] > 0", "approximate", share(_condition("Y", False), 0.65, 1.0)),
    ("eq. 7, Y, flat policies", "the same from logits half as large", "approximate",
     share(_condition("Y", False, 1.5), 0.4, 0.8)),
    ("eq. 8, X", "E[-log pi | X] - H > 0", "approximate", share(_condition("X", True), 0.7, 1.0)),
    ("eq. 8, Y", "E[-log pi | Y] - H > 0", "approximate", share(_condition("Y", True), 0.55, 1.0)),
)  # fmt: skip
