"""Choice of groups for a batch of partial rollouts: within the age limit, none lost, no needless waiting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.rl.types import Problem
from recipes.checks.settings import load_checked
from recipes.loop.partial import Begun, choose
from recipes.rollout.engine import Request


def group(position: int, step: int, complete: bool) -> Begun:
    return Begun(position, step, Problem(str(position), "", ""), Request([1], 1, 0), [] if complete else None)


def test_what_is_complete_first_is_trained_first() -> None:
    begun = [group(0, 4, False), group(1, 4, True), group(2, 5, True), group(3, 5, False)]
    assert [g.position for g in choose(begun, 5, wanted=2, age=2) or []] == [1, 2]
    assert choose(begun, 5, wanted=3, age=2) is None, "three are not complete yet"


def test_a_group_at_its_last_step_is_waited_for() -> None:
    begun = [group(0, 4, False), group(1, 5, True), group(2, 5, True)]
    assert choose(begun, 5, wanted=2, age=1) is None
    begun[0].samples = []
    assert [g.position for g in choose(begun, 5, wanted=2, age=1) or []] == [0, 1], "oldest first"


def test_later_batches_must_have_room_for_what_is_left() -> None:
    """Five old groups, of which the next batch holds two: take one of them now, although newer ones are complete."""
    begun = [*(group(i, 4, False) for i in range(3)), group(3, 5, True), group(4, 5, True)]
    assert choose(begun, 5, wanted=2, age=2) is None
    begun[1].samples = []
    assert [g.position for g in choose(begun, 5, wanted=2, age=2) or []] == [1, 3]


@given(st.data(), st.integers(1, 3), st.integers(1, 3))
def test_any_order_of_completion_leads_to_full_batches_of_allowed_age(
    data: st.DataObject, wanted: int, age: int
) -> None:
    most = data.draw(st.integers(wanted, (1 + age) * wanted))
    begun: list[Begun] = []
    trained: list[int] = []
    position = 0
    for step in range(8):
        while len(begun) < most:
            begun.append(group(position, step, False))
            position += 1
        while (batch := choose(begun, step, wanted=wanted, age=age)) is None:
            waiting = [g for g in begun if g.samples is None]
            data.draw(st.sampled_from(waiting)).samples = []
        assert len(batch) == wanted and all(step - g.step <= age for g in batch)
        assert all(g.samples is not None for g in batch)
        begun = [g for g in begun if g not in batch]
        trained += [g.position for g in batch]
    assert sorted([*trained, *(g.position for g in begun)]) == list(range(position)), "each once, none lost"


PARTIAL = ("rollout.partial=true", "rollout.engine=local", "train.tis_cap=2")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (PARTIAL, "rollout.max_staleness=0 allows none"),
        ((*PARTIAL, "rollout.max_staleness=1", "rollout.generated_prompts=65"), "prompts_per_step = 64 may be open"),
        ((*PARTIAL, "rollout.engine=vllm", "rollout.max_staleness=1"), "rollout.in_flight=keep"),
    ],
)
def test_settings_that_cannot_work(extra: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_checked(["recipe=quickstart", "rollout.prompts_per_step=32", *extra])
    assert load_checked(["recipe=quickstart", *PARTIAL, "rollout.max_staleness=1"]).rollout.partial
