"""Division of a rollout batch into mini-batches, and the weights of their terms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Config
from megatron_ext.rl.selection import build_selection
from megatron_ext.rl.types import Rollout, Sample, TokenStats
from recipes.loop.batch import aggregation_weights, correct_mismatch, make_batch, positive_nll_weights, select, split
from recipes.loop.metrics import StepMetrics


def sample(group: int, length: int, *, correct: bool = False, reason: str = "stop") -> Sample:
    rollout = Rollout([1], [2] * length, [-1.0] * length, [0] * length, reason)
    return Sample(rollout, problem_id=str(group), group=group, seq_id=0, correct=correct)


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), max_size=20), st.integers(1, 7))
def test_no_group_is_cut_and_every_step_but_the_last_is_full(sizes: list[int], prompts: int) -> None:
    """Groups of any sizes; 17 groups in mini-batches of 2 are 9 steps, the last of one group."""
    groups_B = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)], dtype=torch.long)
    minis = split(groups_B, prompts)
    assert [i for mini in minis for i in mini] == list(range(len(groups_B)))
    counts = [len(set(groups_B[mini].tolist())) for mini in minis]
    assert sum(counts) == len(sizes)  # so no group is in two of them
    assert all(count == prompts for count in counts[:-1]) and len(counts) == -(-len(sizes) // prompts)


def test_a_short_batch_weighs_every_group_alike() -> None:
    """`group_token_mean` with 5 of 8 groups left: 1/2 for a group of a full step, 1 for the one of the last step."""
    config = Config()
    config.advantage.aggregation = "group_token_mean"
    samples = [sample(g, length) for g in range(5) for length in (3, 5)]
    batch, groups_B, include_B = make_batch(config, samples)
    got = []
    for mini in split(groups_B, 2):
        weights_B = aggregation_weights(config, build_selection("none"), batch, groups_B, include_B, mini)
        per_group = torch.zeros(5, dtype=torch.float64).index_add_(0, groups_B[batch.seq_ids], weights_B[batch.seq_ids])
        got.append(per_group.tolist())
    assert got == [pytest.approx(w) for w in ([0.5, 0.5, 0, 0, 0], [0, 0, 0.5, 0.5, 0], [0, 0, 0, 0, 1.0])]


@pytest.mark.parametrize("overlong", ["none", "filter"])
def test_the_nll_is_a_mean_over_correct_tokens_of_the_mini_batch(overlong: str) -> None:
    config = Config()
    config.advantage.overlong = overlong
    samples: list[Any] = [
        sample(0, 3, correct=True),
        sample(0, 4),
        sample(1, 2, correct=True, reason="length"),
        sample(1, 5, correct=True),
    ]
    batch, groups_B, _ = make_batch(config, samples)
    for mini in split(groups_B, 1):
        weights = positive_nll_weights(0.1, samples, batch, mini)
        chosen = [i for i in mini if samples[i].correct and not (overlong == "filter" and i == 2)]
        total = sum(len(samples[i].rollout.response_ids) for i in chosen)
        expected = [0.1 / total if i in chosen else 0.0 for i in batch.seq_ids.tolist()]
        assert weights.tolist() == pytest.approx(expected)
    assert positive_nll_weights(0.1, samples, batch, [1]).tolist() == [0.0] * 14  # nothing correct: no term


def test_tokens_that_mismatch_leave_the_denominators() -> None:
    """Two responses of 3 and 5 tokens, one token of each masked away: the mean is over 6."""
    config = Config()
    config.train.tis_cap, config.train.tis_mode = 2.0, "mask"
    samples = [sample(0, 3), sample(0, 5)]
    batch, groups_B, include_B = make_batch(config, samples)
    stats = TokenStats(*(torch.full((8,), -1.0) for _ in range(4)))
    rollout_logp = stats.logp.clone()
    rollout_logp[[1, 4]] -= 2.0
    metrics = StepMetrics(1)
    correct_mismatch(config, batch, stats, rollout_logp, metrics)
    assert batch.mask.tolist() == [True, False, True, True, False, True, True, True]
    weights_B = aggregation_weights(config, build_selection("none"), batch, groups_B, include_B, [0, 1])
    assert weights_B.tolist() == pytest.approx([1 / 6, 1 / 6])
    assert metrics.result({})["mismatch/out_of_bounds_frac"] == 2 / 8


def test_the_weights_of_a_selection_reach_the_batch_per_mini_batch() -> None:
    """A second selection for one sample changes only that sample's weights."""
    config, metrics = Config(), StepMetrics(0)
    batch, _, _ = make_batch(config, [sample(0, 3), sample(0, 5)])
    g = torch.Generator().manual_seed(0)
    batch.advantages = torch.randn(8, generator=g)
    stats = TokenStats(-torch.rand(8, generator=g), torch.rand(8, generator=g), torch.zeros(8), torch.zeros(8))
    batch.old_logp = stats.logp
    steer = build_selection("steer", weight_min=0.5, omega_floor=1e-6)
    select(config, build_selection("none"), batch, stats, 0, [0, 1], metrics)
    assert batch.token_weight is None
    select(config, steer, batch, stats, 0, [0, 1], metrics)
    whole = batch.token_weight
    assert whole is not None and whole.min() == pytest.approx(0.5)
    select(config, steer, batch, stats, 0, [1], metrics)
    assert batch.token_weight is not None and torch.equal(batch.token_weight[:3], whole[:3])
    assert batch.token_weight[3:].min() == pytest.approx(0.5)
