"""The atlas matches the code: region edges are at the papers' values."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ext.rl.losses import build_loss
from recipes.studies.portraits import PORTRAITS, bounds, controller, portrait, weight


@pytest.mark.parametrize(
    ("name", "ratio", "sign", "expected"),
    [
        ("ppo", 1.19, 1, 1.19),
        ("ppo", 1.21, 1, 0.0),
        ("ppo", 0.79, -1, 0.0),
        ("ppo", 1.9, -1, 1.9),
        ("ce_gppo", 1.5, 1, 1.2),
        ("ce_gppo", 0.5, -1, 0.4),
        ("dynamic_upper", 1.45, 1, 1.45),  # p = 0.145: the bound is 1.464
        ("pg", 1.5, 1, 1.0),
        ("aspo", 0.5, 1, 2.0),
        ("bapo", 0.7, -1, 0.7),
        ("gmpo", 1.45, 1, 1.45),
        ("dcpo", 1.5, 1, 1.5),  # p_old 0.1: the bound is 2.25
        ("repo_r", 1.1, 1, 1.1 * (1 - 0.3 * math.log(0.11))),
        ("entropy_shaped", 1.1, 1, 1.1 * (1 - 0.4 * (0.11 * math.log(0.11) + 0.89 * math.log(0.89)))),
        ("entropic", 1.1, 1, 1.1),  # p = 0.11: not likely
    ],
)
def test_weight(name: str, ratio: float, sign: int, expected: float) -> None:
    old = torch.tensor([[math.log(0.1)]], dtype=torch.float64)
    found = weight(build_loss(**PORTRAITS[name].params), old + math.log(ratio), old, sign)
    assert found.shape == (1, 1) and float(found) == pytest.approx(expected)


def test_every_picture_is_drawn() -> None:
    for figure in (portrait(PORTRAITS["gspo"]), bounds(), controller()):
        assert figure.axes
