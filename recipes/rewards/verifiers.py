"""Verifiers: ``(text, gold) -> score``. Nothing here evaluates model output as code.

``final_answer`` and ``random`` are plain string work; ``math`` hands text to a grammar parser and a computer algebra
system and therefore belongs in a worker process (`recipes.rewards.pool`), as does ``format`` with its regular
expression over untrusted text.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from recipes.rewards.custom import NAME, Custom
from recipes.rewards.equality import math_equal
from recipes.rewards.types import MAX_ANSWER_CHARS, OK, RewardItem, RewardResult, Verifier

# ------------------------------------------------------------------------------------------------------ extraction

_BOX = re.compile(r"\\f?boxed\s*")
# What joins boxes that form one answer, as in \boxed{1}, \boxed{2} \text{ and } \boxed{3}: at least a comma or a word.
_JOINT = re.compile(r"(?:[$,;]|\\(?:qquad|quad|[ ,;])|\\text\s*\{[^{}]{0,80}\}|and|or|\s)*")
_SEPARATOR = re.compile(r"[,;]|and|or")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")


def boxed_answer(text: str) -> str | None:
    r"""The final answer: content of the last ``\boxed{...}``, nested braces included.

    Boxes joined to it by commas or "and"/"or" belong to the answer (``\boxed{1} or \boxed{2}`` is "1, 2", so hedging
    does not pay). None when there is no box, or the last one is not closed: a response cut inside its answer has none.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    found = _braced(text, boxes[-1].end(), len(text))
    if found is None:
        return None
    answers, following = [found[0]], boxes[-1].start()
    for box in reversed(boxes[:-1]):
        found = _braced(text, box.end(), following)
        if found is None or not (
            _JOINT.fullmatch(text, found[1], following) and _SEPARATOR.search(text, found[1], following)
        ):
            break
        answers.append(found[0])
        following = box.start()
    return ", ".join(dict.fromkeys(reversed(answers)))


def all_boxes(text: str) -> list[str]:
    """The contents of all boxes that are closed, for trusted text."""
    found = (_braced(text, box.end(), len(text)) for box in _BOX.finditer(text))
    return [box[0] for box in found if box is not None]


def _braced(text: str, start: int, stop: int) -> tuple[str, int] | None:
    r"""Content of the braces that open at ``start`` and the position behind them, None when they do not close before
    ``stop``. Without an opening brace (``\boxed 5``) the next word. Braces escaped as ``\{`` do not count."""
    if start >= stop:
        return None
    if text[start] != "{":
        word = text[start:stop].split(maxsplit=1)[0].rstrip("$.,")
        return word, start + len(word)
    depth, position = 0, start
    while position < stop:
        character = text[position]
        depth += (character == "{") - (character == "}")
        position += 2 if character == "\\" else 1
        if depth == 0:
            return text[start + 1 : position - 1].strip(), position
    return None


def normalise_answer(text: str) -> str:
    """Canonical form of a short answer: no case, no outer punctuation, single spaces, ``$1,200.00`` as ``1200``."""
    text = " ".join(text.split()).strip("$ ").rstrip(".").rstrip("$ ").casefold()
    text = _THOUSANDS.sub("", text)
    if _NUMBER.fullmatch(text):
        sign = "-" if text.startswith("-") else ""
        whole, _, decimals = text.lstrip("+-").partition(".")
        whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
        text = whole + ("." + decimals if decimals else "")
        text = text if text == "0" else sign + text
    return text


# ------------------------------------------------------------------------------------------------------- verifiers


@dataclass(frozen=True, kw_only=True)
class FinalAnswer:
    """1 if the text behind the last marker, up to the end of its line, equals the gold answer after normalisation.

    With ``last_number`` a response without the marker is judged by its last number (Clip-Low/High's rule for GSM8K).
    """

    marker: str = "#"
    last_number: bool = False
    in_process: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.marker:
            raise ValueError("reward.params.marker is empty: name the text that precedes the final answer, such as '#'")

    def __call__(self, item: RewardItem) -> RewardResult:
        answer = self.extract(item.text)
        correct = answer is not None and normalise_answer(answer) == normalise_answer(item.gold) != ""
        return RewardResult(float(correct), correct, OK, answer and answer[:MAX_ANSWER_CHARS])

    def extract(self, text: str) -> str | None:
        """The final answer as written, None when there is none."""
        _, found, tail = text.rpartition(self.marker)
        if found:
            return tail.strip().split("\n", 1)[0]
        if self.last_number:
            numbers = _NUMBER.findall(_THOUSANDS.sub("", text))
            return numbers[-1] if numbers else None
        return None


@dataclass(frozen=True, kw_only=True)
class Math:
    r"""1 if the last ``\boxed{}`` is mathematically equal to the gold answer according to math-verify.

    ``require_box=False`` lets math-verify look for the answer in a response without a box. Boxes longer than
    ``max_answer_chars`` are wrong unread: no gold answer is that long, and parsers choke on them. math-verify's own
    time-outs are off, because they do not hold inside C code: the pool's hard limit is the only clock.
    """

    require_box: bool = True
    max_answer_chars: int = 2000
    max_text_chars: int = 20_000  # of a response without a box: its end is what is searched
    in_process: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.max_answer_chars < 1 or self.max_text_chars < 1:
            raise ValueError("reward.params.max_answer_chars and reward.params.max_text_chars must be positive")

    def __call__(self, item: RewardItem) -> RewardResult:
        answer = boxed_answer(item.text)
        if answer is None and not self.require_box:
            answer = found_answer(item.text[-self.max_text_chars :])
        if not answer:
            return RewardResult(0.0, False)
        gold = ", ".join(all_boxes(item.gold)) or item.gold
        correct = len(answer) <= self.max_answer_chars and math_equal(answer, gold)
        return RewardResult(float(correct), correct, OK, answer[:MAX_ANSWER_CHARS])


_OR_BEFORE = re.compile(r"\bor\b[^\n.;]{0,15}\Z")
_OR_BEHIND = re.compile(r"[^\n.;]{0,8}\bor\b")


def found_answer(text: str) -> str | None:
    """The final answer that math-verify finds in a text without a box, as text.

    None for a choice ("5 or 7"), and where an equation goes on behind it and ends with something else: of "the answer
    is 20 * $40 = $800" math-verify reads 20. Must run in the main thread of a process that may be killed.
    """
    from math_verify import parse

    def read(part: str) -> str | None:
        found = parse(part, parsing_timeout=None)
        return next((item for item in found if isinstance(item, str)), None)

    answer = read(text)
    if answer is None:
        return None
    places = [m.span() for m in re.finditer(rf"(?<![\w.]){re.escape(answer)}(?!\.?\w)", text)]
    if not places:
        return answer
    start, end = places[-1]
    rest = text[end:].split("\n", 1)[0]
    if _OR_BEFORE.search(text, max(0, start - 40), start) or _OR_BEHIND.match(rest):
        return None
    if "=" not in rest:
        return answer
    last = read(rest.rpartition("=")[2])
    return answer if last is not None and math_equal(answer, last) else None


@dataclass(frozen=True, kw_only=True)
class Format:
    """Answer and format together (Entropy Dynamics, appendix B).

    1 both right; 0 answer right, format wrong; both wrong: -1 if the response ran into the length limit, else -0.1.
    "Format right, answer wrong" is not given there: -0.1 here.

    The format itself is not printed in Entropy Dynamics either; the default is the ``<think>``/``<answer>`` template.
    """

    judge: str = "math"  # verifier that decides whether the answer is right
    judge_params: dict[str, Any] = field(default_factory=lambda: {"require_box": False})
    _judge: Verifier = field(init=False, repr=False, compare=False)
    pattern: str = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"  # must match the whole response
    in_process: ClassVar[bool] = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"reward.params.pattern is not a regular expression: {error}") from error
        object.__setattr__(self, "_judge", make_verifier(self.judge, **self.judge_params))

    def __call__(self, item: RewardItem) -> RewardResult:
        judged = self._judge(item)
        formatted = re.fullmatch(self.pattern, item.text, re.DOTALL) is not None
        if judged.correct:
            return RewardResult(1.0 if formatted else 0.0, True, OK, judged.answer)
        return RewardResult(-1.0 if item.truncated and not formatted else -0.1, False, OK, judged.answer)


@dataclass(frozen=True, kw_only=True)
class Random:
    """Rewards independent of prompt and response (Clip-Low/High): Bernoulli(p), or our additions normal(0, 1) and
    uniform(0, 1). A draw is a pure function of ``(seed, item.key)``.

    Only a distribution that is symmetric about its mean (p = 0.5) meets the premise of Clip-Low/High's theorem 1.
    ``correct`` is what ``judge`` says, so that accuracy can be watched although it is not rewarded.
    """

    distribution: str = "bernoulli"
    p: float = 0.5
    seed: int = 0
    judge: str = "final_answer"
    judge_params: dict[str, Any] = field(default_factory=dict)
    _judge: Verifier = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.distribution not in ("bernoulli", "normal", "uniform"):
            raise ValueError(f"reward.params.distribution is bernoulli, normal or uniform, not {self.distribution!r}")
        if not 0 <= self.p <= 1:
            raise ValueError(f"reward.params.p is a probability between 0 and 1, not {self.p}")
        object.__setattr__(self, "_judge", make_verifier(self.judge, **self.judge_params))

    @property
    def in_process(self) -> bool:
        return self._judge.in_process

    def __call__(self, item: RewardItem) -> RewardResult:
        rng = random.Random(f"random-reward/{self.seed}/{item.key}")
        if self.distribution == "bernoulli":
            score = float(rng.random() < self.p)
        else:
            score = rng.gauss(0.0, 1.0) if self.distribution == "normal" else rng.random()
        judged = self._judge(item)
        return RewardResult(score, judged.correct, judged.status, judged.answer)


VERIFIERS: dict[str, Callable[..., Verifier]] = {
    "final_answer": FinalAnswer,
    "math": Math,
    "format": Format,
    "random": Random,
}


def make_verifier(name: str, **params: Any) -> Verifier:
    """Build a verifier. Cheap: heavy libraries, and functions of the user's own, are loaded at the first call.

    Raises ``ValueError`` naming an unknown verifier or parameter and the known ones.
    """
    if NAME.fullmatch(name):
        return Custom(name, dict(params))
    if name not in VERIFIERS:
        listed = ", ".join(VERIFIERS)
        raise ValueError(f"reward.name={name!r} is unknown: choose one of {listed}, or give package.module:function")
    known = list(inspect.signature(VERIFIERS[name]).parameters)
    for key in params:
        if key not in known:
            raise ValueError(f"reward.params.{key} is unknown for the {name} reward: it takes {', '.join(known)}")
    return VERIFIERS[name](**params)
