"""The trace of a few tokens through a step's updates: sides, ratios and gradient weights match the loss."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from megatron_ext.rl.losses import build_loss
from megatron_ext.rl.trace import TokenTrace
from megatron_ext.rl.types import LossInputs

# Flat positions 0..5 of a batch. A clip interval of [0.8, 1.2].
RATIO = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.5, 2.0], dtype=torch.float64)
ADVANTAGE = torch.tensor([-1.0, 2.0, 2.0, 2.0, -1.0, 2.0], dtype=torch.float64)


def add(trace: TokenTrace, places: list[int], *, loss: str = "ppo", drop: int = -1, mask: int = -1) -> None:
    """Add an update of a micro-batch with these positions, in this order."""
    flat = torch.tensor(places)
    inputs = LossInputs(
        logp=RATIO[flat].log(), old_logp=torch.zeros(len(flat)).double(), advantages=ADVANTAGE[flat], mask=flat != mask
    )
    trace.add(flat, inputs, flat != drop, build_loss(loss)(inputs))


def test_sides_and_gradient_weights_are_the_losss_own() -> None:
    trace = TokenTrace(torch.arange(6))
    add(trace, [4, 0, 2])
    add(trace, [5, 3, 1])
    found = trace.of(0, 6)
    assert found is not None
    assert found["ratio"] == RATIO.tolist()
    assert found["clip_side"] == [-1, 0, 1, -1, 1, 1]
    # PPO stops the gradient where the clipped side agrees with the sign of the advantage, else F = r.
    assert found["gradient_weight"] == [0, 1, 0, 0.5, 1.5, 0]


def test_a_loss_that_preserves_gradients_says_so() -> None:
    """CE-GPPO, eq. 4: the low side keeps beta1 (1 - eps), the high side beta2 (1 + eps)."""
    trace = TokenTrace(torch.tensor([0, 2]))
    add(trace, [0, 1, 2], loss="ce_gppo")
    loss = build_loss("ce_gppo")
    found = trace.of(0, 3)
    assert found is not None and found["clip_side"] == [-1, 1]
    low, high = loss.beta1 * (1 - loss.eps_low), loss.beta2 * (1 + loss.eps_high)  # type: ignore[attr-defined]
    assert found["gradient_weight"] == [round(low, 3), round(high, 3)]


def test_updates_are_averaged_and_selection_and_mask_count() -> None:
    trace = TokenTrace(torch.tensor([1, 2, 4]))
    add(trace, [1, 2, 3])
    add(trace, [2, 1], drop=1)  # token selection drops 1: no gradient, still a ratio
    add(trace, [2, 4], mask=4)
    assert trace.of(1, 2) == {"ratio": [1.0], "clip_side": [0.0], "gradient_weight": [0.5]}
    assert trace.of(2, 3) == {"ratio": [1.5], "clip_side": [1.0], "gradient_weight": [0.0]}
    assert trace.of(4, 5) is None, "never in the mask: nothing is known of it"
    assert trace.of(5, 6) is None, "not traced"


def test_no_advantage_no_weight_and_no_number_that_is_not_finite() -> None:
    trace = TokenTrace(torch.tensor([0]))
    zeros = torch.zeros(1).double()
    inputs = LossInputs(logp=zeros, old_logp=zeros, advantages=zeros, mask=torch.tensor([True]))
    trace.add(torch.tensor([0]), inputs, torch.tensor([True]), build_loss("ppo")(inputs))
    assert trace.of(0, 1) == {"ratio": [1.0], "clip_side": [0.0], "gradient_weight": [0.0]}
    trace.add(
        torch.tensor([0]),
        replace(inputs, advantages=zeros + 2),
        zeros + 0.5,
        build_loss("ppo")(replace(inputs, advantages=zeros + 2)),
    )
    assert trace.of(0, 1) == {"ratio": [1.0], "clip_side": [0.0], "gradient_weight": [0.25]}, "a selection's weight"
    trace.sums[3] = math.nan
    assert trace.of(0, 1) is None
    TokenTrace(torch.zeros(0, dtype=torch.long)).add(
        torch.tensor([0]), inputs, torch.tensor([True]), build_loss("ppo")(inputs)
    )
