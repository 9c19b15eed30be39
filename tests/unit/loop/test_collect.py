"""Batches generated ahead: the order of their starts, their first problems, and refusals."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.rl.types import Problem, Rollout, Sample
from recipes.checks.settings import load_checked
from recipes.data.evalsets import EvalSet
from recipes.data.suites import Protocol
from recipes.loop import evaluation
from recipes.loop.collect import Collector
from recipes.loop.journal import Record, encode
from recipes.loop.stream import check_staleness
from recipes.rewards.verifiers import make_verifier
from recipes.rollout.engine import Request, Sampling


class Stub(Collector):
    """Records only the order of calls: a batch takes one more problem than requested when groups are dropped."""

    def __init__(self, *overrides: str) -> None:
        self.config = load_checked(
            ["rollout.prompts_per_step=8", "train.mini_batch_prompts=8", "train.steps=6", *overrides]
        )
        self._executor, self._pending = ThreadPoolExecutor(4), {}
        self.started: list[tuple[int, int]] = []
        self.may_end = {step: threading.Event() for step in range(6)}

    def _collect(self, step: int, start: int | Future[dict[str, Any]]) -> dict[str, Any]:
        position: int = start if isinstance(start, int) else start.result()["position"]
        self.started.append((step, position))
        assert self.may_end[step].wait(10)
        return {"step": step, "position": position + 8 + (1 if self._refills() else 0)}


def test_batches_ahead_are_begun_at_once_where_their_problems_are_known() -> None:
    collector = Stub()
    collector.begin(0, 100, 3)
    collector.may_end[0].set()
    assert collector.finish(0) == {"step": 0, "position": 108}
    collector.begin(1, 108, 2)  # step 0's batch: both have started already
    for event in collector.may_end.values():
        event.set()
    assert collector.finish(1) == {"step": 1, "position": 116} and collector.finish(2) == {"step": 2, "position": 124}
    assert sorted(collector.started) == [(0, 100), (1, 108), (2, 116)]
    collector.begin(5, 200, 3)
    assert collector.finish(5) is not None and collector.finish(6) is None, "no batch after the last step"


def test_with_refills_each_batch_waits_for_the_problems_of_the_one_before() -> None:
    collector = Stub("advantage.drop_uniform_groups=true", "advantage.max_refills=2")
    collector.begin(0, 100, 3)
    collector.may_end[1].set()
    collector.may_end[0].set()
    assert collector.finish(0) == {"step": 0, "position": 109}
    assert collector.finish(1) == {"step": 1, "position": 118}
    collector.may_end[2].set()
    assert collector.finish(2) == {"step": 2, "position": 127}
    assert collector.started == [(0, 100), (1, 109), (2, 118)]


def test_tokens_older_than_allowed_end_the_run() -> None:
    samples = [Sample(Rollout([1], [2, 3], [-1.0, -1.0], versions, "stop"), "p", 0, 0) for versions in ([5, 5], [3, 4])]
    record = Record(encode({"kind": "rollouts", "step": 5, "groups": [(Problem("p", "", ""), samples)]}))
    check_staleness(record, 2)
    with pytest.raises(
        RuntimeError, match="step 6 hold tokens of weight version 3, older than rollout.max_staleness=1"
    ):
        check_staleness(record, 1)
    check_staleness(Record(encode({"kind": "rollouts", "step": 5, "groups": []})), 0)


class Judge(Collector):
    """The real judge with random rewards, in this process, with a stub for the tokenizer."""

    def __init__(self, seed: int) -> None:
        self.config = load_checked([f"seed={seed}", "reward.name=random"])
        self._text, self.sampling = threading.Lock(), Sampling(1)
        self.tokenizer = SimpleNamespace(decode=lambda ids, **_: "")
        self.scorer = SimpleNamespace(score=lambda items: [make_verifier("random")(item) for item in items])  # type: ignore[assignment]

    def rewards(self, *key: object) -> list[float]:
        problems = [Problem("0", "", "")] * 8
        requests = [Request([1], 8, 0, rollouts=[Rollout([1], [2], [-1.0], [0], "stop")] * 8) for _ in problems]
        self.engine = SimpleNamespace(complete=lambda requests, **_: iter([requests]))  # type: ignore[assignment]
        groups = self._judged(problems, requests, key, {"generate": 0.0, "reward": 0.0})
        return [s.reward for members in groups for s in members]


def test_random_rewards_depend_on_seed_step_and_attempt() -> None:
    """A second generation call of a step, or another run seed, gets different rewards."""
    first = Judge(0).rewards("train", 3, 0)
    assert Judge(0).rewards("train", 3, 0) == first
    others = [Judge(0).rewards("train", 3, 1), Judge(0).rewards("train", 4, 0), Judge(1).rewards("train", 3, 0)]
    assert all(other != first for other in others)


class Answerer:
    """A `Respondent` without an engine: records the number of problems per request."""

    def __init__(self, slots: int, concurrent: bool) -> None:
        self.slots, self.concurrent = slots, concurrent
        self.asked: list[int] = []

    def respond(self, name: str, problems: Any, protocol: Protocol) -> list[list[Sample]]:
        self.asked.append(len(problems))
        return [[Sample(Rollout([1], [2], [-1.0], [0], "stop"), p.id, 0, 0)] * protocol.n for _, p in problems]


@pytest.mark.parametrize(
    ("short", "long", "asked"),
    [(5.0, 30.0, [2, 4, 8, 16, 16, 4]), (0.0, 30.0, [2] * 25), (0.0, 0.0, [2] + [1] * 48)],
)
def test_an_engine_in_this_process_is_asked_for_little_at_first(
    monkeypatch: pytest.MonkeyPatch, short: float, long: float, asked: list[int]
) -> None:
    """A slow engine then shows progress and loses little when killed; a fast one soon gets full batches."""
    monkeypatch.setattr(evaluation, "SHORT_S", short)
    monkeypatch.setattr(evaluation, "LONG_S", long)
    problems = [Problem(str(i), "", "") for i in range(50)]
    answerer = Answerer(slots=64, concurrent=False)
    parts = list(evaluation.answer_set(answerer, EvalSet("set", Protocol(n=4, k=(1,)), problems, 50)))
    assert answerer.asked == asked
    assert [item.position for part in parts for item in part] == list(range(50))
