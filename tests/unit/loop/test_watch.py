"""Steps without a learning signal, and entropies at their limits, are reported during the run."""

from __future__ import annotations

import math

import pytest

from configs.load import load_config
from recipes.loop.watch import Watch

GOOD = {"critic/rewards/std": 0.4, "critic/rewards/mean": 0.5, "actor/grad_norm": 1.0, "actor/entropy": 0.5}


def watch(*words: str) -> Watch:
    return Watch(load_config(list(words)), vocab_size=32)


def test_a_run_that_learns_is_not_warned() -> None:
    w = watch()
    assert [text for _ in range(50) for text in w.observe(GOOD)] == [] and w.stalled == ""


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"critic/rewards/std": 0.0, "critic/rewards/mean": 0.0}, "all rewards are 0; the problems are too hard"),
        ({"critic/rewards/std": 0.0, "critic/rewards/mean": 1.0}, "all rewards are 1; the problems are too easy"),
        ({"actor/grad_norm": 0.0}, "every gradient is zero"),
        ({"rollout/samples": 0.0}, "no group had a difference in reward"),
        ({"actor/entropy": 1e-5}, "the policy always gives the same response"),
        ({"actor/entropy": 0.99 * math.log(32)}, "ln V is 3.47: the policy is near uniform"),
    ],
)
def test_warnings_name_the_reason_and_do_not_flood(values: dict[str, float], said: str) -> None:
    w = watch()
    texts = [w.observe({**GOOD, **values}) for _ in range(400)]
    given = [i + 1 for i, found in enumerate(texts) if found]
    assert given == [3, 30, 300] and said in texts[2][0] and texts[2][0].startswith("warning: ")
    assert w.stalled == "", "warnings alone by default"


def test_one_good_step_begins_anew() -> None:
    w = watch()
    bad = {**GOOD, "actor/grad_norm": 0.0}
    assert [w.observe(values) for values in (bad, bad, GOOD, bad, bad)] == [[]] * 5
    assert len(w.observe(bad)) == 1


def test_a_run_that_collapses_in_its_last_steps_does_not_end_without_a_word() -> None:
    w = watch()
    collapsed = {**GOOD, "actor/entropy": 3e-6}
    assert [w.observe(values) for values in (GOOD, collapsed, collapsed)] == [[]] * 3
    (said,) = w.at_end()
    assert said == "warning: entropy 3e-06 nats in the last 2 steps: the policy always gives the same response"
    assert w.observe(collapsed) and w.at_end() == [], "said already"
    assert w.observe(GOOD) == [] and w.at_end() == []


def test_a_critic_learns_from_equal_rewards() -> None:
    w = watch("advantage.name=gae", "train.stop_after_silent_steps=1")
    w.observe({**GOOD, "critic/rewards/std": 0.0})
    assert w.stalled == ""


def test_a_run_can_stop_itself() -> None:
    w = watch("train.stop_after_silent_steps=2")
    bad = {**GOOD, "critic/rewards/std": 0.0, "critic/rewards/mean": 0.0}
    w.observe(bad)
    assert w.stalled == ""
    w.observe(bad)
    assert w.stalled.startswith("no learning signal in 2 steps in a row: all rewards are 0")
