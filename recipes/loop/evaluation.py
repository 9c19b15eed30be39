"""Sample and judge n responses per problem of a set, with many requests in flight; results come as they finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol as Interface

from megatron_ext.rl.types import Problem, Sample
from recipes.data.evalsets import EvalSet
from recipes.data.suites import Protocol
from recipes.loop.estimators import Estimate, summarise
from recipes.rewards.verifiers import normalise_answer

THREADS = 16  # chunks in flight; each waits for its slowest response
SHORT_S, LONG_S = 5.0, 30.0  # a call of an engine in this process: a shorter one may grow, a longer one shrinks


class Respondent(Interface):
    """Interface for generation and judging, implemented by `recipes.loop.collect.Collector`."""

    @property
    def slots(self) -> int:
        """Number of responses that the engine generates at the same time."""
        ...

    @property
    def concurrent(self) -> bool:
        """Whether concurrent calls make it faster."""
        ...

    def respond(self, name: str, problems: Sequence[tuple[int, Problem]], protocol: Protocol) -> list[list[Sample]]:
        """``n`` judged samples per (position in the set, problem)."""
        ...


@dataclass
class Answered:
    """The judged samples of one problem."""

    position: int  # in the set
    problem: Problem
    samples: list[Sample]


def answer_set(
    respondent: Respondent, evaluated: EvalSet, skip: Callable[[int], bool] = lambda position: False
) -> Iterator[list[Answered]]:
    """Yield answered problems in groups, as they finish, until the set is complete; ``skip``: positions done before."""
    todo = [item for item in enumerate(evaluated.problems) if not skip(item[0])]
    pace = _Pace(respondent, evaluated.protocol.n)
    running: dict[Future[list[list[Sample]]], list[tuple[int, Problem]]] = {}
    executor = ThreadPoolExecutor(pace.threads, thread_name_prefix="evaluation")
    try:
        while todo or running:
            while len(running) < pace.threads and todo:
                part, todo = todo[: pace.chunk], todo[pace.chunk :]
                running[executor.submit(respondent.respond, evaluated.name, part, evaluated.protocol)] = part
            begin = time.monotonic()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                part = running.pop(future)
                yield [
                    Answered(position, problem, samples)
                    for (position, problem), samples in zip(part, future.result(), strict=True)
                ]
            pace.took(time.monotonic() - begin)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


class _Pace:
    """Problems per call (``chunk``) and calls at a time (``threads``) that keep the engine full.

    An engine in this process answers one call at a time, and nothing is on disk or shown before a call ends. So the
    first calls are small, and they grow as long as they are short.
    """

    def __init__(self, respondent: Respondent, n: int) -> None:
        at_a_time = max(1, -(-respondent.slots // n))
        self._most = at_a_time
        if respondent.concurrent:
            self.threads = min(THREADS, at_a_time)
            self.chunk = -(-at_a_time // self.threads)
        else:
            self.threads, self.chunk = 1, max(1, at_a_time // 8)

    def took(self, seconds: float) -> None:
        """How long the calls that have just ended took."""
        if self.threads == 1 and seconds < SHORT_S:
            self.chunk = min(self._most, 2 * self.chunk)
        elif self.threads == 1 and seconds > LONG_S:
            self.chunk = max(1, self.chunk // 2)


def estimate(
    correct: Sequence[Sequence[bool]], answers: Sequence[Sequence[str | None]], ks: Sequence[int]
) -> dict[str, Estimate]:
    """avg@n, pass@k and, if any answer was found, maj@k. Both arguments are [problem][sample]."""
    read = any(answer for of_problem in answers for answer in of_problem)
    votes = [[answer and normalise_answer(answer) for answer in of_problem] for of_problem in answers]
    return summarise(correct, ks, answers=votes if read else None)


def flat_metrics(name: str, estimates: dict[str, Estimate], problems: int, truncated: float) -> dict[str, float]:
    """``<set>/<estimate>`` with the ends of its interval over problems, and the counts that it is based on.

    ``truncated``: share of the responses that hit the length limit.
    """
    flat: dict[str, float] = {}
    for label, e in estimates.items():
        flat |= {f"{name}/{label}": e.mean, f"{name}/{label}/low": e.low, f"{name}/{label}/high": e.high}
    return flat | {f"{name}/problems": float(problems), f"{name}/truncated": truncated}


def set_metrics(evaluated: EvalSet, answered: Sequence[Answered]) -> dict[str, float]:
    """`flat_metrics` of a set whose problems are all answered."""
    ordered = sorted(answered, key=lambda item: item.position)
    correct = [[sample.correct for sample in item.samples] for item in ordered]
    answers = [[sample.answer for sample in item.samples] for item in ordered]
    cut = [sample.rollout.finish_reason == "length" for item in ordered for sample in item.samples]
    estimates = estimate(correct, answers, evaluated.protocol.k)
    return flat_metrics(evaluated.name, estimates, len(ordered), sum(cut) / len(cut))


class Progress:
    """Prints the progress of an evaluation from time to time: problems, samples, tokens per second, time left."""

    def __init__(self, name: str, total: int, done: int, say: Callable[[str], None], every_s: float = 10.0) -> None:
        self._name, self._total, self._done, self._say, self._every_s = name, total, done, say, every_s
        self._begun = self._said = time.monotonic()
        self._new = self._tokens = 0

    def add(self, answered: Sequence[Answered]) -> None:
        """Count finished problems, and print a line if the last one is old enough."""
        self._new += len(answered)
        self._tokens += sum(len(sample.rollout.response_ids) for item in answered for sample in item.samples)
        now = time.monotonic()
        if now - self._said < self._every_s or self._done + self._new >= self._total:
            return
        self._said = now
        elapsed = now - self._begun
        left = (self._total - self._done - self._new) * elapsed / self._new
        self._say(
            f"{self._name}: {self._done + self._new}/{self._total} problems  {self._tokens / elapsed:.0f} tok/s  "
            f"{left / 60:.1f} min left"
        )
