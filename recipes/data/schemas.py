r"""Parse rows of common training data sets into problems.

Problem text: ``problem``, ``question`` or ``prompt`` (text, or verl's list of chat messages). Answer: ``answer``,
``final_answer``, ``ground_truth``, verl's ``reward_model.ground_truth``, or the last ``\boxed{}`` of ``solution``
(MATH). That covers DeepScaleR, MATH, GSM8K (an answer ends behind ``####``), DAPO-Math-17k and Klear's MathSub-30K.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from megatron_ext.rl.types import Problem

TEXTS = ("problem", "question", "prompt")
ANSWERS = ("answer", "final_answer", "ground_truth", "expected_answer")
SOLUTION_MARK = "####"  # GSM8K writes its final answers behind it
MAX_TEXT = 1_000_000  # characters of a problem; longer texts are refused
# DAPO-Math-17k puts its own instructions around every problem; here data.template says them.
_DAPO_HEAD = "Solve the following math problem step by step. The last line of your response should be of the form"
_DAPO_TAIL = 'Remember to put your answer on its own line after "Answer:".'


def to_problem(row: Any, *, where: str, default_id: str) -> Problem:
    """One row. Raises ValueError in one sentence that begins with ``where``."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a JSON object with problem and answer is needed, not {type(row).__name__}")
    text = _text(row, where)
    answer = _answer(row, where)
    for name, value in (("problem", text), ("answer", answer)):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: {name} has half of a surrogate pair ({value[error.start]!r}), no text"
            ) from error
    identity = row.get("id", row.get("unique_id"))
    if identity is not None and not isinstance(identity, (str, int)):
        raise ValueError(f"{where}: id must be text or a whole number, not {type(identity).__name__}")
    return Problem(id=default_id if identity is None else str(identity), prompt=text, answer=answer)


def _text(row: Mapping[str, Any], where: str) -> str:
    text = next((row[key] for key in TEXTS if row.get(key) is not None), None)
    if isinstance(text, list):
        text = _user_message(text, where)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: problem is missing or empty; add the text of the task")
    if len(text) > MAX_TEXT:
        raise ValueError(f"{where}: problem has {len(text):,} characters; at most {MAX_TEXT:,} are read")
    return _without_dapo(text)


def _user_message(messages: list[Any], where: str) -> str:
    """The user's message. A system message is left to ``data.template``; answers of an assistant are refused."""
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: prompt must be text, or messages with role and content")
        if message.get("role") not in ("user", "system"):
            raise ValueError(f"{where}: prompt has a message of {message.get('role')!r}; one of the user is needed")
    mine = [message["content"] for message in messages if message["role"] == "user"]
    if len(mine) != 1:
        raise ValueError(f"{where}: prompt has {len(mine)} messages of the user; one is needed")
    return str(mine[0])


def _without_dapo(text: str) -> str:
    if text.startswith(_DAPO_HEAD) and text.rstrip().endswith(_DAPO_TAIL):
        return text.rstrip().removesuffix(_DAPO_TAIL).partition("\n\n")[2].strip() or text
    return text


def _answer(row: Mapping[str, Any], where: str) -> str:
    answer = next((row[key] for key in ANSWERS if row.get(key) is not None), None)
    if answer is None:
        answer = _reward_model(row.get("reward_model"), where)
    if answer is None and isinstance(row.get("solution"), str):
        answer = last_box(row["solution"])
        if answer is None:
            raise ValueError(f"{where}: no answer, and no \\boxed{{}} in its solution; add the final answer as text")
    text = _as_text(answer, where)
    text = text.rpartition(SOLUTION_MARK)[2].strip()
    if not text:
        raise ValueError(f"{where}: answer is missing or empty; add the final answer as text")
    return text


def _reward_model(given: Any, where: str) -> Any:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"{where}: reward_model is text, but not JSON") from error
    return given.get("ground_truth") if isinstance(given, Mapping) else None


def _as_text(answer: Any, where: str) -> str:
    if isinstance(answer, bool) or answer is None:
        return ""
    if isinstance(answer, (int, float)):
        if isinstance(answer, float) and not math.isfinite(answer):
            raise ValueError(f"{where}: answer is {answer}; add the final answer as text")
        return (
            str(int(answer))
            if isinstance(answer, float) and answer.is_integer() and abs(answer) < 2**53
            else str(answer)
        )
    if isinstance(answer, list) and answer and all(isinstance(item, (str, int, float)) for item in answer):
        return ", ".join(_as_text(item, where) for item in answer)  # all of several answers
    if isinstance(answer, str):
        return answer
    raise ValueError(f"{where}: answer is missing or empty; add the final answer as text, not {type(answer).__name__}")


def last_box(text: str) -> str | None:
    r"""Content of the last ``\boxed{}``, None when there is none or it is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, position = 0, start + len("\\boxed")
    while position < len(text):
        depth += (text[position] == "{") - (text[position] == "}")
        position += 2 if text[position] == "\\" else 1
        if depth == 0:
            return text[start + len("\\boxed{") : position - 1].strip()
    return None
