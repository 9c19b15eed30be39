"""Named, validated parameters: from ``name`` and keywords to a frozen dataclass, or one clear ``ValueError``.

Losses, selections and schedules are chosen by a name in a YAML group. Each is a dataclass whose fields are its
parameters. The same errors can occur in all of them, so the messages are here.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def build(group: str, table: Mapping[str, type[T]], name: str, params: Mapping[str, Any]) -> T:
    """Instantiate ``table[name](**params)``.

    Args:
        group: config group, e.g. ``"loss"``; only used in messages.
        table: name -> dataclass.
        params: field -> value.
    Raises:
        ValueError: unknown name or field, with the nearest known one; a value of another type than the field's; or
            an error of the class's own check.
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
        check_type(f"{group}.{key}", params[key], _hints(cls)[key])  # type: ignore[arg-type]
    return cls(**params)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def check_type(key: str, value: object, hint: Any) -> None:
    """Raise ``ValueError`` naming ``key`` unless ``value`` has the type ``hint``. NaN is refused."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in arguments:
            return
        (hint,) = (argument for argument in arguments if argument is not type(None))
        check_type(key, value, hint)
    elif origin is Literal:
        check_choice(key, value, arguments)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        _require(key, value, Mapping, "a mapping such as {name: value}")
        for name, item in value.items():  # type: ignore[attr-defined]
            check_type(f"{key}.{name}", item, arguments[1])
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        _require(key, value, (list, tuple), "a list such as [1,2]")
        for item in value:  # type: ignore[attr-defined]
            check_type(key, item, arguments[0])
    elif hint is float:
        _require(key, value, (int, float), "a number", bool)
        if value != value:
            raise ValueError(f"{key}={value!r} is not of the right type: give a number.")
    elif hint is int:
        _require(key, value, int, "a whole number", bool)
    elif hint in (bool, str):
        _require(key, value, hint, "true or false" if hint is bool else "text")


def _require(key: str, value: object, wanted: Any, words: str, unwanted: Any = ()) -> None:
    if not isinstance(value, wanted) or isinstance(value, unwanted):
        raise ValueError(f"{key}={value!r} is not of the right type: give {words}.")


def suggest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


_LARGEST = sys.float_info.max


def check_number(
    key: str, value: object, low: float = -_LARGEST, high: float = _LARGEST, *, exclusive: bool = False
) -> None:
    """Raise ``ValueError`` naming ``key`` unless ``value`` is a number in [low, high] (or (low, high)).

    NaN is refused. Infinity is accepted only if ``high`` is infinite.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (low < value < high if exclusive else low <= value <= high):  # type: ignore[operator]
        return
    below = "(-inf" if low == -_LARGEST else f"{'(' if exclusive else '['}{low:g}"
    above = "inf)" if high == _LARGEST else f"{high:g}{')' if exclusive else ']'}"
    raise ValueError(f"{key}={value!r} is out of range: set a number in {below}, {above}.")


def check_choice(key: str, value: object, choices: Iterable[object]) -> None:
    """Raise ``ValueError`` naming ``key`` unless ``value`` is one of ``choices``."""
    choices = list(choices)
    names = [str(choice) for choice in choices]
    if value not in choices or isinstance(value, bool):
        raise ValueError(f"{key}={value!r} is unknown{suggest(str(value), names)}; choose {' | '.join(names)}.")
