"""Named, validated parameters: from ``name`` and keywords to a frozen dataclass, or one clear ``ValueError``.

Losses, selections and schedules are all chosen by a name in a YAML group, and all are dataclasses whose fields are
their parameters. What can go wrong is therefore the same everywhere and is worded here once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def build(group: str, table: Mapping[str, type[T]], name: str, params: Mapping[str, Any]) -> T:
    """Instantiate ``table[name](**params)``.

    Args:
        group: config group, e.g. ``"loss"``; only used in messages.
        table: name -> dataclass.
        params: field -> value.
    Raises:
        ValueError: unknown name or field, with the nearest known one; or whatever the class's own check says.
    """
    if name not in table:
        raise ValueError(f"{group}.name={name!r} is unknown{suggest(name, table)}; choose one of {', '.join(table)}.")
    cls = table[name]
    known = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
    for key in params:
        if key not in known:
            raise ValueError(
                f"{group}.{key}={params[key]!r} is not a parameter of {name!r}{suggest(key, known)}; "
                f"it takes {', '.join(known) or 'none'}."
            )
    return cls(**params)


def suggest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_number(
    key: str, value: object, low: float = -math.inf, high: float = math.inf, *, exclusive: bool = False
) -> None:
    """Raise ``ValueError`` naming ``key`` unless ``value`` is a number in [low, high] (or (low, high)); NaN is not."""
    brackets = "()" if exclusive else "[]"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (low < value < high if exclusive else low <= value <= high):  # type: ignore[operator]
        return
    raise ValueError(f"{key}={value!r} is out of range: set a number in {brackets[0]}{low:g}, {high:g}{brackets[1]}.")


def check_choice(key: str, value: object, choices: Iterable[str]) -> None:
    """Raise ``ValueError`` naming ``key`` unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown{suggest(str(value), choices)}; choose {' | '.join(choices)}.")
