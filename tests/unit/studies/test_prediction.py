"""Predicted against measured change of entropy of a run."""

from __future__ import annotations

import pytest

from recipes.reporting.charts import main_charts
from recipes.studies import prediction

STEPS = range(1, 9)
SLOPES = [(s, -0.5 * (1 + s % 3)) for s in STEPS]
SERIES = {
    "theory/entropy_slope": SLOPES,
    "actor/updates": [(s, 4) for s in STEPS],
    "actor/lr": [(s, 0.1) for s in STEPS],
    "actor/entropy": [(s, 2.0 - 0.1 * s * s) for s in STEPS],
}


def test_without_a_probe_the_next_batch_is_the_measurement() -> None:
    pairs = prediction.changes(SERIES)
    assert len(pairs) == 7  # the last step has no next one
    assert pairs[0] == (pytest.approx(0.4 * SLOPES[0][1]), pytest.approx(-0.3))


def test_a_probe_measures_the_same_tokens() -> None:
    probed = {"theory/entropy_change_same_tokens": [(s, 0.7 * 0.4 * x) for s, x in SLOPES if s != 3]}
    pairs = prediction.changes(SERIES | probed)
    assert len(pairs) == 7  # step 3 was not probed, and no other value replaces it
    found = prediction.agreement(pairs)
    assert found is not None
    assert (found.correlation, found.slope, found.same_sign) == (pytest.approx(1), pytest.approx(0.7), 1.0)
    titles = [chart.title for chart in main_charts({"run": SERIES | probed})[0]]
    assert "Entropy change, predicted and measured" in titles


def test_agreement_of_noise() -> None:
    x = [1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 1.5, -1.5]
    y = [1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0]
    found = prediction.agreement(list(zip(x, y, strict=True)))
    assert found is not None and found.correlation == pytest.approx(0, abs=1e-12)
    low, high = found.correlation_interval
    assert (low, high) == (pytest.approx(-0.7049, abs=1e-3), pytest.approx(0.7049, abs=1e-3))
    assert found.same_sign == 0.5 and found.same_sign_interval[0] < 0.25


def test_too_little_to_say() -> None:
    assert prediction.agreement([(1.0, 1.0)] * 4) is None
    assert prediction.agreement([(1.0, float(i)) for i in range(9)]) is None
    assert prediction.changes({}) == []
