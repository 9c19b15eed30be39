"""Importance weights against the rollout engine, by hand and against a second implementation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.rl.mismatch import correct

F64 = torch.float64
# Three responses of 3, 1 and 2 tokens, and two tokens that do not count.
RHO = torch.tensor([1.0, 4.0, 0.5, 3.0, 0.01, 1.0, 9.0, math.nan], dtype=F64)
IDS = torch.tensor([0, 0, 0, 1, 2, 2, 2, 1])
MASK = torch.tensor([True] * 6 + [False] * 2)
ROLLOUT = torch.full((8,), -5.0, dtype=F64)


def run(**options: Any) -> Any:
    return correct(ROLLOUT + RHO.log(), ROLLOUT, IDS, MASK, **options)


def test_off_changes_nothing_and_still_measures() -> None:
    got = run(high=None)
    assert got.weight.tolist() == [1.0] * 8 and torch.equal(got.keep, MASK)
    assert got.metrics["mismatch/effective_sample_size"] == pytest.approx(1.0)
    assert got.metrics["mismatch/chi2_token"] > 0


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [1.0, 2.0, 0.5, 2.0, 0.25, 1.0]),
        ("sequence", [2.0, 2.0, 2.0, 2.0, 0.25, 0.25]),  # products 2, 3 and 0.01
        ("geometric", [2 ** (1 / 3)] * 3 + [2.0] + [0.25, 0.25]),  # cube root of 2, 3, 0.1
    ],
)
def test_truncation(level: str, expected: list[float]) -> None:
    got = run(high=2.0, low=0.25, level=level)
    assert got.weight[:6].tolist() == pytest.approx(expected) and torch.equal(got.keep, MASK)


@pytest.mark.parametrize(
    ("level", "kept"),
    [("token", [1, 0, 1, 0, 0, 1]), ("sequence", [1, 1, 1, 0, 0, 0]), ("geometric", [1, 1, 1, 0, 0, 0])],
)
def test_masking_drops_what_is_out_of_bounds_and_leaves_the_rest_alone(level: str, kept: list[int]) -> None:
    """IcePop at the token level."""
    got = run(high=2.0, low=0.25, level=level, mode="mask")
    assert got.keep.tolist() == [bool(k) for k in kept] + [False] * 2
    inside = run(high=1e9, level=level).weight
    assert torch.equal(got.weight[got.keep], inside[got.keep])
    assert got.metrics["mismatch/out_of_bounds_frac"] == pytest.approx(1 - sum(kept) / 6)


def test_a_catastrophic_token_vetoes_its_response() -> None:
    got = run(high=2.0, veto=0.02)
    assert got.keep.tolist() == [True] * 4 + [False] * 4
    assert got.metrics["mismatch/vetoed_frac"] == pytest.approx(2 / 6)
    assert torch.equal(run(high=None, veto=0.02).keep, got.keep)  # with the weights off, too


def test_metrics_by_hand() -> None:
    got = run(high=2.0)
    rho = RHO[:6]
    weight = rho.clamp(max=2)
    products = torch.tensor([2.0, 3.0, 0.01], dtype=F64)
    want = {
        "kl": -rho.log().mean(),
        "k3_kl": (rho - rho.log() - 1).mean(),
        "chi2_token": rho.square().mean() - 1,
        "chi2_seq": products.square().mean() - 1,
        "effective_sample_size": weight.sum() ** 2 / (6 * weight.square().sum()),
        "weight_mean": weight.mean(),
    }
    for name, value in want.items():
        assert got.metrics[f"mismatch/{name}"] == pytest.approx(float(value)), name


@given(st.integers(0, 10**6), st.floats(0, 200), st.sampled_from(["token", "sequence", "geometric"]))
def test_everything_stays_finite(seed: int, spread: float, level: str) -> None:
    g = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(30, generator=g)
    ids, mask = torch.arange(30) // 7, torch.rand(30, generator=g) > 0.2
    got = correct(rollout + spread * torch.randn(30, generator=g), rollout, ids, mask, high=2.0, level=level)
    assert torch.isfinite(got.weight).all() and all(math.isfinite(v) for v in got.metrics.values())
    none = correct(rollout, rollout, ids, torch.zeros(30).bool(), high=2.0, level=level, mode="mask")
    assert not none.keep.any() and all(math.isfinite(v) for v in none.metrics.values())


@pytest.mark.parametrize(
    "bad", [{"high": 0}, {"high": 2.0, "low": 2}, {"high": 2.0, "level": "seq"}, {"high": 2, "veto": -1}]
)
def test_bad_settings_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="train.tis_"):
        run(**{"high": 2.0, **bad})
