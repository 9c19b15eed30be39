"""Diagnostics of a batch: the predicted entropy change against a finite difference, the rest by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.rl import diagnostics as d
from megatron_ext.rl.losses import LOSSES, build_loss
from megatron_ext.rl.objective import Coefficients, evaluate
from megatron_ext.rl.selection import SELECTIONS, build_selection
from megatron_ext.rl.types import LossInputs, TokenStats
from recipes.studies import theorems as theory
from recipes.studies.slopes import LOSS_PARAMS, TabularBatch, slopes, statistics, tabular_batch

F64 = torch.float64


def close(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


SELECTION_PARAMS: dict[str, dict[str, Any]] = {
    "clip_b": {"mu_low": 0.5},
    "clip_v": {"mu_low": 0.5, "mu_high": 0.5},
    "clip_cov": {"frac": 0.2, "cov_low": 0.0},
    "kl_cov": {"frac": 0.2},
    "region": {"region": "e2"},
    "entropy_bonus": {"coef": 0.1},
    "entropy_ratio": {"low": 0.8, "high": 1.2},
    "steer": {"weight_min": 0.5},
}


@pytest.mark.parametrize("selection", sorted(SELECTIONS.keys() - {"unlikely"}))  # it only shapes rewards
@pytest.mark.parametrize("loss", LOSSES)
def test_the_predicted_entropy_change_is_the_measured_one(loss: str, selection: str) -> None:
    """A small step of every token's logits along the gradient of the whole objective, in both directions."""
    select = build_selection(selection, **SELECTION_PARAMS.get(selection, {}))
    measured, predicted, _ = slopes(tabular_batch(), build_loss(loss, **LOSS_PARAMS.get(loss, {})), select)
    assert abs(measured) > 1e-4
    assert predicted == pytest.approx(measured, rel=1e-8, abs=1e-8)


def test_the_prediction_knows_the_loss_and_the_selection() -> None:
    """The printed formula does not: it is the same for every clipped loss and every selection."""
    batch = tabular_batch()
    found, unclipped = {}, set()
    for loss, params, selection in (
        ("ppo", {}, "none"),
        ("ppo", {"eps_low": 1, "eps_high": math.inf}, "none"),
        ("ce_gppo", {"beta1": 0.0, "beta2": 1.0}, "none"),
        ("ppo", {}, "clip_b"),
    ):
        select = build_selection(selection, **SELECTION_PARAMS.get(selection, {}))
        _, predicted, without = slopes(batch, build_loss(loss, **params), select)
        found[loss, str(params), selection] = round(predicted, 6)
        unclipped.add(round(without, 12))
    assert len(set(found.values())) == 4 and len(unclipped) == 1


def test_the_unclipped_slope_is_the_masked_covariance() -> None:
    batch = tabular_batch(1)
    objective, x, stats = batch.objective(
        batch.z_TV.clone().requires_grad_(), build_loss("ppo"), build_selection("none")
    )
    got = d.diagnostics(d.diagnostic_sums(stats, x, objective))["entropy_slope_unclipped"]
    centred = theory.centred_discriminants(batch.z_TV).gather(1, batch.actions[:, None]).squeeze(1)
    rd = ((x.logp.detach() - x.old_logp).exp() * centred)[batch.mask]
    a = batch.advantages[batch.mask]
    close(got, -((a - a.mean()) * (rd - rd.mean())).mean())


def test_token_quantities_equal_the_tabular_ones() -> None:
    batch = tabular_batch(2)
    stats = statistics(batch.z_TV, batch.actions)
    s = theory.discriminants(batch.z_TV)
    close(d.discriminant(stats), s.gather(1, batch.actions[:, None]).squeeze(1))
    close(d.expected_discriminant(stats), (batch.z_TV.softmax(-1) * s).sum(-1))
    score = torch.nn.functional.one_hot(batch.actions, 4) - batch.z_TV.softmax(-1)
    close(d.score_norm(stats), score.norm(dim=-1))


def cut(batch: TabularBatch, rows: slice) -> TabularBatch:
    return TabularBatch(**{name: value[rows] for name, value in vars(batch).items()})


def test_sums_add_up_over_any_cut_and_ignore_what_is_masked() -> None:
    batch = tabular_batch(3)
    none, loss = build_selection("none"), build_loss("ppo")
    spoiled = replace(batch, z_TV=torch.where(batch.mask[:, None], batch.z_TV, math.nan))
    objective, x, stats = batch.objective(batch.z_TV.clone().requires_grad_(), loss, none)
    whole = d.diagnostic_sums(stats, x, objective)
    parts = []
    for rows in (slice(0, 7), slice(7, 8), slice(8, len(batch.mask))):
        part = cut(spoiled, rows)
        objective, x, stats = part.objective(part.z_TV.clone().requires_grad_(), loss, none)
        parts.append(d.diagnostic_sums(stats, x, objective))
    for name, value in whole.items():
        assert value.dtype == F64 and value.dim() == 0
        close(torch.stack([part[name] for part in parts]).sum(), value)


def test_an_empty_mask_gives_zeros() -> None:
    batch = replace(tabular_batch(4), mask=torch.zeros(480, dtype=torch.bool))
    objective, x, stats = batch.objective(
        batch.z_TV.clone().requires_grad_(), build_loss("ppo"), build_selection("none")
    )
    assert all(value == 0 for value in d.diagnostics(d.diagnostic_sums(stats, x, objective)).values())


def test_regions_by_hand() -> None:
    """p, r, A of eleven tokens and the region of each; boundaries: p = 0.3 is low, p = 0.7 is neither."""
    cases = [
        (0.8, 1.1, 1.0, "E1", "PA_HP"),
        (0.2, 1.1, 1.0, "E2", "PA_LP"),
        (0.3, 1.2, 1.0, "E2", "PA_LP"),
        (0.8, 0.9, -1.0, "E3", "NA_HP"),
        (0.1, 0.9, -1.0, "E4", "NA_LP"),
        (0.5, 1.1, 1.0, None, "PA_LP"),
        (0.6, 1.1, 1.0, None, "PA_HP"),
        (0.8, 0.9, 1.0, None, "PA_HP"),
        (0.1, 1.4, 1.0, None, "PA_LP"),
        (0.1, 0.6, -1.0, None, "NA_LP"),
        (0.8, 1.1, 0.0, None, None),
    ]
    # exp(log 0.3) may round to just above 0.3, hence the nudge.
    logp = torch.tensor([c[0] for c in cases], dtype=torch.float64).log()
    logp[2] = math.log(0.3) - 1e-12
    ratio = torch.tensor([c[1] for c in cases], dtype=torch.float64)
    advantages = torch.tensor([c[2] for c in cases], dtype=torch.float64)
    regions = d.region_masks(logp, ratio, advantages)
    quadrants = d.quadrant_masks(logp, advantages)
    for i, (*_, region, quadrant) in enumerate(cases):
        assert [name for name, member in regions.items() if member[i]] == ([region] if region else [])
        assert [name for name, member in quadrants.items() if member[i]] == ([quadrant] if quadrant else [])
    assert tuple(regions) == d.REGIONS and tuple(quadrants) == d.QUADRANTS


def two_action_states(p: list[float]) -> TokenStats:
    p_T = torch.tensor(p, dtype=F64)
    return statistics(torch.stack([p_T.log(), (1 - p_T).log()], dim=1), torch.zeros(len(p), dtype=torch.long))


def test_shares_of_tokens_and_of_gradient_mass() -> None:
    """States with p = 0.8 (A = 1) and p = 0.2 (A = -1): the score norms are 0.2 sqrt 2 and 0.8 sqrt 2."""
    stats = two_action_states([0.8, 0.2, 0.2, 0.2, 0.2])
    logp = stats.logp.detach().requires_grad_()
    a = torch.tensor([1.0, -1.0, -1.0, -1.0, 9.0], dtype=F64)
    mask = torch.tensor([True, True, True, True, False])
    x = LossInputs(logp, stats.logp, a, mask, entropy=stats.entropy)
    keep = torch.tensor([True, True, True, False, True])  # a token that selection drops has no gradient
    zeros = torch.zeros(5, dtype=F64)
    weight = torch.tensor([4.0, 0.5, 0.5, 0.5, 7.0], dtype=F64)
    got = d.diagnostics(
        d.diagnostic_sums(stats, x, evaluate(build_loss("ppo"), x, Coefficients(weight, keep, zeros, zeros)))
    )
    close(got["tokens/PA_HP"], 1 / 4)
    close(got["tokens/NA_LP"], 3 / 4)
    close(got["grad/PA_HP"], 0.8 / (0.8 + 0.4 + 0.4))
    close(got["grad/NA_LP"], 0.8 / 1.6)
    assert got["tokens/E1"] == 0  # r = 1 exactly is in no region


def events(loss: str, **params: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Events of one state with actions in proportion to pi_old (10 draws), and the diagnostics."""
    z_old = torch.tensor([0.5, 0.3, 0.2], dtype=F64).log()
    z = z_old + torch.tensor([0.5, -0.7, 0.1], dtype=F64)
    actions = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    stats, zeros, every = statistics(z.expand(10, 3), actions), torch.zeros(10, dtype=F64), torch.ones(10).bool()
    a = torch.tensor([1.0, -1.0] * 5, dtype=F64)
    x = LossInputs(stats.logp, statistics(z_old.expand(10, 3), actions).logp, a, every, torch.arange(10), stats.entropy)
    objective = evaluate(build_loss(loss, **params), x, Coefficients(zeros + 0.1, every, zeros, zeros))
    return z, z_old, d.diagnostics(d.diagnostic_sums(stats, x, objective))


def test_clip_terms_estimate_theorem_1() -> None:
    """The terms are Clip-Low/High's, whatever the sign of the advantages."""
    z, z_old, got = events("ppo")
    p, s = z.softmax(-1), theory.discriminants(z)
    low, high = theory.clip_events(z, z_old, eps_low=0.2, eps_high=0.2)
    assert low.tolist() == [0, 1, 0] and high.tolist() == [1, 0, 0]
    mean_q = (p * s).sum()
    close(got["q_gap_low"], mean_q - s[1])
    close(got["q_gap_high"], mean_q - s[0])
    slope = theory.clipped_gradient(z, z_old, eps_low=0.2, eps_high=0.2).slope
    close(got["clip_low_term"] - got["clip_high_term"], slope)


@pytest.mark.parametrize(
    ("loss", "params", "low", "high"),
    [
        ("ppo", {"eps_low": 1}, False, True),  # an int, and clip-low off
        ("ppo", {"eps_high": math.inf}, True, False),
        ("dynamic_clip", {"strategy": "both", "alpha_high": 0, "b_high": 0.9}, True, False),
        ("gspo", {"eps_low": 0.9, "eps_high": 0.1}, False, True),  # one token a sequence: s = r
        ("pg", {}, False, False),
    ],
)
def test_clip_terms_take_the_bounds_of_the_loss(loss: str, params: dict[str, Any], low: bool, high: bool) -> None:
    _, _, got = events(loss, **params)
    assert (bool(got["clip_low_term"] != 0), bool(got["clip_high_term"] != 0)) == (low, high)
