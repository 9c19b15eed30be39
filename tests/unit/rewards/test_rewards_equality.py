"""Equality of answers: pairs that must be accepted, and a larger set of pairs that must be rejected."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.rewards.equality import math_equal
from recipes.rewards.latex import clean, exact

CASES = Path(__file__).parent / "cases"


def pairs(name: str) -> list[tuple[str, str]]:
    lines = (CASES / name).read_text(encoding="utf-8").splitlines()
    rows = [line.rpartition(" | ") for line in lines if line and not line.startswith("#")]
    return [(answer, gold) for answer, _, gold in rows]


def test_there_are_enough_adversarial_pairs() -> None:
    assert len(set(pairs("adversarial.txt"))) >= 200


@pytest.mark.parametrize(("answer", "gold"), pairs("adversarial.txt"))
def test_wrong_answers_are_never_accepted(answer: str, gold: str) -> None:
    assert not math_equal(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), pairs("accepted.txt"))
def test_equal_answers_are_accepted(answer: str, gold: str) -> None:
    assert math_equal(answer, gold)


@pytest.mark.parametrize(("_", "gold"), [*pairs("accepted.txt"), *pairs("adversarial.txt")])
def test_an_answer_equals_itself_and_cleaning_is_stable(_: str, gold: str) -> None:
    assert math_equal(gold, gold)
    assert clean(clean(gold)) == clean(gold)


def test_exact_numbers_refuse_what_would_take_forever() -> None:
    for text in ("9^{999999999}", "9" * 5000, "1e999999999", r"2\times10^{99999999}"):
        assert exact(text) is None
