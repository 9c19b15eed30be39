"""Advantages against hand-computed numbers and against the definitions in plain Python."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.rl.advantages import compute_advantages, gae, informative_groups, soft_overlong_penalty, unlikely

R = torch.tensor([1.0, 0.0, 0.1, 0.0, 0.1, 0.1, 1.0, 5.0], dtype=torch.float64)
G = torch.tensor(
    [7, 7, 3, 7, 3, 3, 7, 9]
)  # 7: {1, 0, 0, 1}; 3: all equal, with numbers that do not sum exactly; 9: a single sample


def by_group(fn: object) -> list[float]:
    out = [0.0] * len(R)
    for g in set(G.tolist()):
        index = [i for i in range(len(R)) if G[i] == g]
        for i, value in zip(index, fn([R[i].item() for i in index]), strict=True):  # type: ignore[operator]
            out[i] = value
    return out


def test_grpo_is_standardised_in_the_group() -> None:
    assert compute_advantages("grpo", R, G, delta=0.0).tolist() == pytest.approx(
        [math.sqrt(3) / 2 * s for s in (1, -1, 0, -1, 0, 0, 1, 0)]  # sample std of {1, 0, 0, 1} is 1 / sqrt 3
    )
    population = compute_advantages("grpo", R, G, delta=0.0, unbiased=False)
    assert population.tolist() == pytest.approx([1, -1, 0, -1, 0, 0, 1, 0])
    default = compute_advantages("grpo", R, G)[0].item()
    assert default == pytest.approx(0.5 / (1 / math.sqrt(3) + 1e-6), rel=1e-14)


def test_dr_grpo_and_rloo() -> None:
    assert compute_advantages("dr_grpo", R, G).tolist() == pytest.approx([0.5, -0.5, 0, -0.5, 0, 0, 0.5, 0])

    def leave_one_out(rewards: list[float]) -> list[float]:
        n = len(rewards)
        return [r - (sum(rewards) - r) / (n - 1) if n > 1 else 0.0 for r in rewards]

    assert compute_advantages("rloo", R, G).tolist() == pytest.approx(by_group(leave_one_out), abs=1e-8)


def test_reinforce_pp_normalises_over_the_batch() -> None:
    rewards = R.tolist()
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    plain = compute_advantages("reinforce_pp", R, G, delta=0.0)
    assert plain.tolist() == pytest.approx([(r - mean) / std for r in rewards])
    centred = by_group(lambda rs: [r - statistics.fmean(rs) for r in rs])
    based = compute_advantages("reinforce_pp", R, G, baseline="group", delta=0.0)
    assert based.tolist() == pytest.approx([c / statistics.pstdev(centred) for c in centred], abs=1e-8)
    assert (based[G == 3] == 0).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), min_size=1, max_size=12), st.randoms())
def test_group_estimators_are_centred_and_follow_permutations(pairs: list[tuple[float, int]], rnd: object) -> None:
    rewards = torch.tensor([r for r, _ in pairs], dtype=torch.float64)
    groups = torch.tensor([g for _, g in pairs])
    order = list(range(len(pairs)))
    rnd.shuffle(order)  # type: ignore[attr-defined]
    for name in ("grpo", "dr_grpo", "rloo"):
        a = compute_advantages(name, rewards, groups)
        for g in groups.unique():
            assert abs(a[groups == g].sum().item()) < 1e-6
        shuffled = compute_advantages(name, rewards[order], groups[order])
        torch.testing.assert_close(shuffled, a[order], rtol=1e-6, atol=1e-9)


def test_all_equal_groups_get_exactly_zero_and_are_uninformative() -> None:
    for name in ("grpo", "dr_grpo", "rloo"):
        a = compute_advantages(name, R, G)
        assert (a[(G == 3) | (G == 9)] == 0).all() and a.dtype == torch.float64
    assert informative_groups(R, G).tolist() == [g == 7 for g in G.tolist()]
    assert informative_groups(torch.zeros(0), torch.zeros(0).long()).shape == (0,)


def test_bad_calls_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'rloo'"):
        compute_advantages("rlo", R, G)
    with pytest.raises(ValueError, match="advantage.params.detla=1 .*did you mean 'delta'"):
        compute_advantages("grpo", R, G, detla=1)
    with pytest.raises(ValueError, match="advantage.params.delta=-1"):
        compute_advantages("grpo", R, G, delta=-1)
    with pytest.raises(ValueError, match="shapes"):
        compute_advantages("grpo", R, G[:2])
    with pytest.raises(ValueError, match="not finite"):
        compute_advantages("grpo", R * math.nan, G)


def test_unlikely_scales_positive_rewards_by_rank() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, -1.0, 1.0, 1.0])
    groups = torch.tensor([5, 5, 5, 5, 2, 2])
    logp = torch.tensor([-3.0, -1.0, -2.0, -4.0, -7.0, -7.0])  # ranks 3, 1, 2, 4 of 4; a tie: 1, 2 of 2
    expected = [1 - 0.25 / 4, 1 - 0.25 * 3 / 4, 0, -1, 1 - 0.25 / 2, 1]
    assert unlikely(rewards, groups, logp).tolist() == pytest.approx(expected, rel=1e-15)
    assert unlikely(rewards, groups, logp, beta_rank=0.0).tolist() == rewards.tolist()


def test_soft_overlong_penalty() -> None:
    lengths = torch.tensor([0, 80, 85, 100, 120])
    assert soft_overlong_penalty(lengths, max_tokens=100, buffer=20).tolist() == pytest.approx([0, 0, -0.25, -1, -1])
    assert soft_overlong_penalty(lengths, max_tokens=100, buffer=20, factor=0.5)[2] == pytest.approx(-0.125)
    with pytest.raises(ValueError, match="advantage.overlong_buffer=200"):
        soft_overlong_penalty(lengths, max_tokens=100, buffer=200)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.0, 1.0)])
def test_gae_over_ragged_tokens_is_the_double_sum(gamma: float, lam: float) -> None:
    g = torch.Generator().manual_seed(0)
    lengths, ids = [3, 1, 6], [4, 0, 2]
    seq = torch.repeat_interleave(torch.tensor(ids), torch.tensor(lengths))
    rewards, values = torch.randn(2, 10, generator=g, dtype=torch.float64)
    expected = []
    for i in ids:
        r, v = rewards[seq == i].tolist(), [*values[seq == i].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        expected += [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(r))]
    advantages, returns = gae(rewards, values, seq, gamma=gamma, lam=lam)
    assert advantages.tolist() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(returns, advantages + values)


def test_gae_refuses_a_sequence_in_pieces() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        gae(torch.zeros(3), torch.zeros(3), torch.tensor([0, 1, 0]))


def qae_by_definition(rewards: list[float], quantile: float) -> float:
    """inf {x : F(x) >= quantile} over the values that occur."""
    shares = {x: sum(r <= x for r in rewards) / len(rewards) for x in rewards}
    return min(x for x, share in shares.items() if share >= quantile - 1e-12)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=12), st.sampled_from([0.2, 0.4, 0.5, 0.6, 0.9]))
def test_qae_rewards_rare_successes_and_penalises_rare_failures(rewards: list[float], quantile: float) -> None:
    got = compute_advantages(
        "qae", torch.tensor(rewards), torch.zeros(len(rewards)).long(), quantile=quantile, delta=0.0
    )
    mean, std = sum(rewards) / len(rewards), float(torch.tensor(rewards, dtype=torch.float64).std())
    if std == 0:
        assert (got == 0).all()
        return
    baseline = qae_by_definition(rewards, quantile)
    assert baseline == (0.0 if mean <= 1 - quantile + 1e-12 else 1.0)  # the two regimes of the paper
    assert got.tolist() == pytest.approx([(r - baseline) / std for r in rewards])


def test_qae_interpolates_as_the_authors_code_on_request() -> None:
    rewards, groups = torch.tensor([0, 0, 0, 1, 1, 0.5, 2.0]), torch.tensor([3, 3, 3, 3, 3, 1, 1])
    got = compute_advantages("qae", rewards, groups, quantile=0.6, delta=0.0, interpolate=True)
    first, second = rewards[:5].double(), rewards[5:].double()
    expected = [(v - torch.quantile(v, 0.6)) / v.std() for v in (first, second)]
    torch.testing.assert_close(got, torch.cat(expected))
