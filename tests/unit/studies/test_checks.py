"""`make theory` is the test of the theorems: every check has the expected result, and each kind can fail."""

from __future__ import annotations

import pytest
from torch import Tensor

from recipes.studies import theorems
from recipes.studies.checks import CHECKS, entropy_dynamics, own_weights
from recipes.studies.checks.kinds import Check, drifted, first_order


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.paper.split(',')[0]}: {check.label}")
def test_check(check: Check) -> None:
    outcome = check.run()
    assert outcome.verdict == check.expected, outcome.measured


def _run(label: str) -> str:
    papers = (entropy_dynamics.PAPER, own_weights.PAPER)
    return next(check for check in CHECKS if check.label == label and check.paper in papers).run().verdict


@pytest.mark.parametrize("label", ["theorem 2", "cor. 1", "cor. 3.1", "GRPO", "CE-GPPO (1, 0.5)"])
def test_a_missing_baseline_is_found(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theorems, "centred_discriminants", theorems.discriminants)
    assert _run(label) == "fails"


def test_a_clip_at_the_wrong_bound_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    events = theorems.clip_events

    def swapped(z: Tensor, old: Tensor, *, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor]:
        low, high = events(z, old, eps_low=eps_low, eps_high=eps_high)
        return high, low

    direction = theorems.clipped_gradient

    def claim(seed: int) -> tuple[Tensor, theorems.FirstOrder]:
        z, old = drifted(seed)
        right = direction(z, old, eps_low=0.2, eps_high=0.2)
        monkeypatch.setattr(theorems, "clip_events", swapped)
        wrong = direction(z, old, eps_low=0.2, eps_high=0.2)
        monkeypatch.setattr(theorems, "clip_events", events)
        return z, theorems.FirstOrder(right.direction, wrong.slope)

    assert first_order(claim)().verdict == "fails"
