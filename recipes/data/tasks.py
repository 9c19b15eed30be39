"""Generated, verifiable tasks: problems without a download, as pure functions of ``(seed, index)``.

* ``chain`` is the quick start's task: three one-digit operations modulo 10, small enough that a model of 0.3M
  parameters learns it in a minute, rich enough that a policy has something to explore (equivalent wordings, noise,
  wrong beliefs). Its demonstrations are what the supervised warm start imitates.
* ``word_problem`` writes arithmetic stories in the manner of GSM8K, for a pretrained model when no data set is at hand.

Every draw is keyed, never sequential, so problem 17 is the same whether or not problem 16 was ever made. The split is
a hash of the problem's *text*: held-out and training problems are disjoint by construction, for all seeds at once.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import lru_cache

from megatron_ext.rl.types import Problem

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 1 / 16  # of all texts, by hash

LABELS = ("A", "B", "C")  # one per operation; labelled steps make the task learnable in a minute
OPERATORS = ("+", "-", "*")
CONNECTORS = ("so", "then", "next", "now", "thus", "hence")  # synonyms: free choice, hence entropy
ANSWER_MARKER = "#"
CHAIN_WORDS = (*(str(digit) for digit in range(10)), *OPERATORS, *LABELS, *CONNECTORS, "=", ANSWER_MARKER)

P_RESTATE = 0.9  # a step repeats its operator and operand, which makes the lookup faster to learn
P_MERGE = 0.1  # a step is not written out, but merged with the next one
P_STEP_WRONG = 0.08  # a step's result is a random digit instead of the right one
P_COPY_WRONG = 0.03  # the last result is copied wrongly behind the marker
MISCONCEIVED_SHARE = 0.1  # of the 300 facts (x, op, d) ...
P_MISCONCEPTION = 0.65  # ... which are shown with one fixed wrong result this often: the right one is in the minority


def keyed_rng(*key: object) -> random.Random:
    """Independent generator per key. Seeding with text hashes it (SHA-512), so neighbouring keys are unrelated, and
    the stream is the same on every platform and Python version."""
    return random.Random("/".join(map(str, key)))


def split_of(text: str) -> str:
    """``"heldout"`` for about ``HELDOUT_SHARE`` of all texts, else ``"train"``; depends only on the text."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
    return "heldout" if bucket < HELDOUT_SHARE else "train"


def _draw(kind: str, seed: int, index: int, split: str, make: Callable[[random.Random], tuple[str, str]]) -> Problem:
    """First text drawn under the key ``(kind, seed, split, index)`` that belongs to ``split``."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if index < 0:
        raise ValueError(f"problem index must be >= 0, not {index}")
    rng = keyed_rng(kind, seed, split, index)
    while True:
        prompt, answer = make(rng)
        if split_of(prompt) == split:
            return Problem(id=f"{kind}-{seed}-{split}-{index}", prompt=prompt, answer=answer)


# ---------------------------------------------------------------------------------------------------------- chain


def apply_operator(x: int, operator: str, operand: int) -> int:
    """``x operator operand`` modulo 10."""
    results = {"+": x + operand, "-": x - operand, "*": x * operand}
    return results[operator] % 10


def chain_problem(seed: int, index: int, *, split: str = "train") -> Problem:
    """Problem such as ``"7 A + 3 B * 4 C - 2 ="``, answer ``"8"`` (all arithmetic modulo 10).

    Raises ``ValueError`` for a negative index or an unknown split.
    """
    return _draw("chain", seed, index, split, _make_chain)


def _make_chain(rng: random.Random) -> tuple[str, str]:
    start = value = rng.randrange(10)
    words = [str(start)]
    for label in LABELS:
        operator, operand = rng.choice(OPERATORS), rng.randrange(10)
        words += [label, operator, str(operand)]
        value = apply_operator(value, operator, operand)
    return " ".join([*words, "="]), str(value)


@lru_cache(maxsize=4096)
def misconception(seed: int, x: int, operator: str, operand: int) -> int | None:
    """The wrong result that the demonstrations of ``seed`` usually show for this fact, or None for a sound fact."""
    rng = keyed_rng("misconception", seed, x, operator, operand)
    if rng.random() >= MISCONCEIVED_SHARE:
        return None
    return (apply_operator(x, operator, operand) + rng.randrange(1, 10)) % 10


def chain_demonstration(seed: int, index: int) -> tuple[str, str]:
    """``(prompt, response)`` of an imperfect teacher, both space-separated words without special tokens.

    A response is ``CONNECTOR LABEL [op d] result`` per step, then ``# result``: 11 to 17 words, or fewer when steps
    are merged. Errors carry on: later steps go on from what was written. The prompts are training problems
    (``split="train"``), so nothing held out is ever demonstrated.
    """
    prompt = chain_problem(seed, index).prompt
    rng = keyed_rng("demonstration", seed, index)
    words = prompt.split()
    steps = [(words[i], words[i + 1], int(words[i + 2])) for i in range(1, len(words) - 1, 3)]
    value, response, merged = int(words[0]), [], False
    for label, operator, operand in steps:
        value = _teacher_result(rng, seed, value, operator, operand)
        merged = not merged and label != LABELS[-1] and rng.random() < P_MERGE
        if merged:
            continue
        response += [rng.choice(CONNECTORS), label]
        if rng.random() < P_RESTATE:
            response += [operator, str(operand)]
        response.append(str(value))
    if rng.random() < P_COPY_WRONG:
        value = rng.randrange(10)
    return prompt, " ".join([*response, ANSWER_MARKER, str(value)])


def _teacher_result(rng: random.Random, seed: int, x: int, operator: str, operand: int) -> int:
    if rng.random() < P_STEP_WRONG:
        return rng.randrange(10)
    believed = misconception(seed, x, operator, operand)
    if believed is not None and rng.random() < P_MISCONCEPTION:
        return believed
    return apply_operator(x, operator, operand)


# --------------------------------------------------------------------------------------------------- word problems

_NAMES = ("Ana", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stickers")

# Story, answer as a function of the numbers a, b, c, d, and their inclusive ranges, which keep every
# answer a positive whole number. ``bc`` stands for the product of b and c.
_Story = tuple[str, Callable[..., int], dict[str, tuple[int, int]]]
_STORIES: tuple[_Story, ...] = (
    (
        "{name} has {a} {things}. {other} gives {name} {b} more {things}. How many {things} does {name} have now?",
        lambda a, b: a + b,
        {"a": (2, 60), "b": (2, 40)},
    ),
    (
        "{name} had {a} {things} and lost {b} of them. How many {things} are left?",
        lambda a, b: a - b,
        {"a": (30, 90), "b": (2, 29)},
    ),
    (
        "There are {a} boxes with {b} {things} in each box. How many {things} are there in total?",
        lambda a, b: a * b,
        {"a": (2, 12), "b": (2, 15)},
    ),
    (
        "{name} buys {a} packs of {b} {things} and gives {c} {things} to {other}. How many {things} does {name} keep?",
        lambda a, b, c: a * b - c,
        {"a": (3, 9), "b": (4, 12), "c": (2, 11)},
    ),
    (
        "{name} has {a} {things}. {other} has {b} times as many. How many {things} do they have together?",
        lambda a, b: a + a * b,
        {"a": (2, 25), "b": (2, 6)},
    ),
    (
        "{name} shares {bc} {things} equally among {b} friends and then buys {a} new {things} for every friend. "
        "How many {things} does each friend get?",
        lambda a, b, c: a + c,
        {"a": (1, 9), "b": (2, 8), "c": (2, 12)},
    ),
    (
        "{name} earns ${a} an hour and works {b} hours a day. After {c} days {name} spends ${d} on a gift. "
        "How many dollars does {name} have left?",
        lambda a, b, c, d: a * b * c - d,
        {"a": (8, 20), "b": (2, 8), "c": (2, 6), "d": (5, 30)},
    ),
    (
        "A shop sells {a} {things} on Monday and {b} more than that on Tuesday. On Wednesday it sells twice as many "
        "as on Tuesday. How many {things} does it sell in the three days?",
        lambda a, b: a + (a + b) + 2 * (a + b),
        {"a": (5, 40), "b": (2, 20)},
    ),
    (
        "A train travels at {a} miles per hour for {b} hours and then at {c} miles per hour for {d} hours. "
        "How many miles does it travel in total?",
        lambda a, b, c, d: a * b + c * d,
        {"a": (30, 60), "b": (2, 5), "c": (20, 70), "d": (2, 5)},
    ),
)

_SMALL = (2, 9)
_ONE_STEP_STORIES: tuple[_Story, ...] = (
    (
        "{name} has {a} {things} and buys {b} more. How many {things} does {name} have?",
        lambda a, b: a + b,
        {"a": _SMALL, "b": _SMALL},
    ),
    (
        "{name} has {a} {things} and gives {b} to {other}. How many {things} does {name} keep?",
        lambda a, b: a - b,
        {"a": (11, 19), "b": _SMALL},
    ),
    (
        "There are {a} boxes with {b} {things} in each box. How many {things} are there?",
        lambda a, b: a * b,
        {"a": _SMALL, "b": _SMALL},
    ),
)


def word_problem(seed: int, index: int, *, split: str = "train") -> Problem:
    """An arithmetic story of one to three steps with a positive whole-number answer.

    Raises ``ValueError`` for a negative index or an unknown split.
    """
    return _draw("word_problem", seed, index, split, _make_story)


def one_step_problem(seed: int, index: int, *, split: str = "train") -> Problem:
    """A story with one addition, subtraction or multiplication of numbers from 2 to 9: within reach of a small model.

    Raises ``ValueError`` for a negative index or an unknown split.
    """
    return _draw("one_step", seed, index, split, lambda rng: _make_story(rng, _ONE_STEP_STORIES))


def _make_story(rng: random.Random, stories: Sequence[_Story] = _STORIES) -> tuple[str, str]:
    story, answer, ranges = rng.choice(stories)
    numbers = {key: rng.randint(low, high) for key, (low, high) in ranges.items()}
    name, other = rng.sample(_NAMES, 2)
    product = numbers.get("b", 0) * numbers.get("c", 0)  # a number that is sure to divide evenly
    text = story.format(name=name, other=other, things=rng.choice(_THINGS), bc=product, **numbers)
    return text, str(answer(**numbers))
