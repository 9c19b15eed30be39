"""Estimators against closed forms and brute force."""

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.loop.estimators import (
    avg_at_k,
    bootstrap_interval,
    exact_interval,
    maj_at_k,
    pass_at_k,
    seed_interval,
    summarise,
)


@pytest.mark.parametrize(
    ("n", "c", "k", "value"), [(8, 0, 8, 0), (8, 1, 8, 1), (4, 2, 1, 0.5), (4, 2, 2, 5 / 6), (5, 4, 2, 1)]
)
def test_pass_at_k_closed_forms(n: int, c: int, k: int, value: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=1e-15)


@given(st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 9))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_is_unbiased() -> None:
    # Expectation over c ~ Binomial(n, p), in exact arithmetic, is 1 - (1-p)^k for every n >= k.
    n, k, p = 10, 4, Fraction(3, 10)
    expectation = sum(
        comb(n, c) * p**c * (1 - p) ** (n - c) * (1 - Fraction(comb(n - c, k), comb(n, k))) for c in range(n + 1)
    )
    assert expectation == 1 - (1 - p) ** k
    measured = sum(comb(n, c) * 0.3**c * 0.7 ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert measured == pytest.approx(float(expectation), abs=1e-12)


def test_pass_at_k_survives_large_n() -> None:
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5, abs=1e-12)
    assert 0 < pass_at_k(4096, 1, 1) < 1e-3


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_the_undefined(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="undefined"):
        pass_at_k(n, c, k)


def test_avg_at_k() -> None:
    assert avg_at_k([[True, False], [True, True], [False] * 4]) == [0.5, 1.0, 0.0]
    for empty in ([], [[]]):
        with pytest.raises(ValueError, match="at least one"):
            avg_at_k(empty)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_interval(rng.random(60).tolist(), confidence=0.9, resamples=300, seed=trial)
        covered += low <= 0.5 <= high
    assert 0.84 < covered / 300 < 0.95


def test_bootstrap_interval_has_the_width_of_the_central_limit() -> None:
    values = np.random.default_rng(1).normal(size=2000)
    low, high = bootstrap_interval(values.tolist(), seed=2)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 2000**0.5, rel=0.1)
    assert low < values.mean() < high
    assert bootstrap_interval(values.tolist(), seed=2) == (low, high)


def test_bootstrap_interval_of_a_constant_is_a_point() -> None:
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_interval([1.0], confidence=95)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 20, 0.0, 1 - 0.025 ** (1 / 20)), (20, 20, 0.025 ** (1 / 20), 1.0), (5, 10, 0.187086, 0.812914)],
)
def test_exact_interval(successes: int, trials: int, low: float, high: float) -> None:
    """Closed forms at the ends, and the tabulated value for 5 of 10."""
    assert exact_interval(successes, trials) == pytest.approx((low, high), abs=1e-6)
    with pytest.raises(ValueError, match="not a share"):
        exact_interval(trials + 1, trials)


@pytest.mark.parametrize("truth", [0.02, 0.3])
def test_exact_interval_never_covers_less_than_it_says(truth: float) -> None:
    """Summed over all outcomes of 60 trials; a bootstrap covers 2 % in 70 of 100 cases only."""
    weights = [comb(60, c) * truth**c * (1 - truth) ** (60 - c) for c in range(61)]
    covered = sum(w for c, w in enumerate(weights) if exact_interval(c, 60)[0] <= truth <= exact_interval(c, 60)[1])
    assert 0.95 <= covered < 0.995


def test_problems_that_count_as_0_or_1_get_exact_intervals() -> None:
    summary = summarise([[True], [False], [False]], [1])
    assert (summary["avg@1"].low, summary["avg@1"].high) == exact_interval(1, 3)
    assert summary["avg@1"].seed_low is None, "one sample says nothing of others"
    summary = summarise([[False] * 4] * 5, [1, 4])
    assert [e.high for e in summary.values()] == [pytest.approx(1 - 0.025 ** (1 / 5))] * 3
    assert summary["pass@4"].seed_low is summary["avg@4"].seed_low is None, "all samples agree"


def test_summarise() -> None:
    outcomes = [[True, False, False, False], [True, True, True, True], [False, False, False, False]]
    summary = summarise(outcomes, [1, 4])
    assert list(summary) == ["avg@4", "pass@1", "pass@4"]
    assert summary["avg@4"].mean == summary["pass@1"].mean == pytest.approx(5 / 12)
    assert summary["pass@4"].mean == pytest.approx(2 / 3)
    assert all(0 <= estimate.low <= estimate.mean <= estimate.high <= 1 for estimate in summary.values())
    with pytest.raises(ValueError, match=r"same number of samples, got \[1, 2\]"):
        summarise([[True], [True, False]], [1])
    with pytest.raises(ValueError, match="same number"):
        summarise([], [1])


@pytest.mark.parametrize(
    ("correct", "answers", "value"),
    [
        ([True, False, False], ["1", "2", "3"], 1 / 3),  # a tie of three
        ([True, True, False], ["1", "1.0", "2"], 1.0),  # equal answers share their votes, whatever their form
        ([True, False, False], ["1", "2", "2"], 0.0),
        ([True, False, False], ["1", None, None], 1.0),  # no answer, no vote
        ([False, False, False], [None, None, None], 0.0),
        ([True, False, True, False], ["1", "2", "1", "2"], 0.5),
    ],
)
def test_majority_of_all_samples(correct: list[bool], answers: list[str | None], value: float) -> None:
    assert maj_at_k(correct, answers, len(correct)) == pytest.approx(value)


def test_majority_of_some_samples_agrees_with_all_subsets() -> None:
    correct, answers = [True, True, False, False, False, False], ["a", "a", "b", "b", "c", None]
    subsets = list(combinations(range(6), 3))
    exact = sum(maj_at_k([correct[i] for i in s], [answers[i] for i in s], 3) for s in subsets) / len(subsets)
    assert maj_at_k(correct, answers, 3) == pytest.approx(exact, abs=0.07)  # 400 draws: 3 standard errors
    assert maj_at_k(correct, answers, 1) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="undefined"):
        maj_at_k(correct, answers, 7)


def test_seed_interval_covers_another_run_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth, n, covered = rng.random(40), 8, 0
    for trial in range(200):
        low, high = seed_interval(rng.binomial(n, truth).tolist(), n, 1, seed=trial, resamples=300)
        covered += low <= truth.mean() <= high
    assert covered / 200 > 0.9
    assert seed_interval([0, 8], 8, 1) == (0.5, 0.5), "always and never do not vary"


def test_summary_with_answers_has_majorities_and_both_intervals() -> None:
    outcomes = [[True, True, False, False], [False] * 4]
    summary = summarise(outcomes, [1, 2, 4], answers=[["1", "1", "2", "3"], ["5", "5", None, "6"]])
    assert list(summary) == ["avg@4", "pass@1", "pass@2", "pass@4", "maj@2", "maj@4"]
    assert summary["maj@4"].mean == 0.5 and summary["pass@4"].seed_low is None
    low, high = summary["avg@4"].seed_low, summary["avg@4"].seed_high
    assert low is not None and high is not None and low <= 0.25 <= high
