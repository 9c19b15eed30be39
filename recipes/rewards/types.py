"""Input and output of a verifier. No imports, so that reward workers load this in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

OK, TIMEOUT, CRASH, INVALID = "ok", "timeout", "crash", "invalid"
MAX_ANSWER_CHARS = 200  # of an answer that is reported


@dataclass(frozen=True, slots=True)
class RewardItem:
    """One response to be judged."""

    text: str  # decoded response, without the prompt; untrusted
    gold: str  # reference answer
    truncated: bool = False  # the response hit the length limit
    key: int = 0  # unique within the run; keys counter-based random rewards


@dataclass(frozen=True, slots=True)
class RewardResult:
    """The verdict on one response.

    ``status``: ``ok``; ``timeout`` and ``crash`` when the worker had to be replaced; ``invalid`` when the verifier
    raised an error. All but ``ok`` carry the configured failure score and ``correct=False``.
    """

    score: float
    correct: bool
    status: str = OK
    answer: str | None = None  # the final answer as it was read, at most `MAX_ANSWER_CHARS` of it
    terms: tuple[float, ...] = ()  # scores before weighting, of a reward with several terms


class Verifier(Protocol):
    """A pure function of the item: equal items get equal results, in any process and any order."""

    @property
    def in_process(self) -> bool:
        """Harmless string work that may run inside the trainer."""
        ...

    def __call__(self, item: RewardItem) -> RewardResult: ...
