"""Typed values of a JSON configuration; an error is one sentence with key and value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LARGEST = 2**31 - 1  # of any size; a larger value is a mistake


def shown(value: Any) -> str:
    """A value of any length, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Fields:
    """Typed access to the keys of a JSON object. A missing key and `null` mean the same: the default.

    Every method raises ValueError, naming key and value, for a value of another kind.
    """

    def __init__(self, values: Mapping[str, Any], inside: str = "") -> None:
        self.values = values
        self._inside = f" of {inside}" if inside else ""

    def get(self, key: str) -> Any:
        """The value as it is; None when there is none."""
        return self.values.get(key)

    def wrong(self, key: str, must: str) -> ValueError:
        return ValueError(f"{key}={shown(self.get(key))}{self._inside} in config.json must be {must}")

    def integer(self, key: str, *, least: int = 1, most: int = LARGEST, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(key, "a positive integer" if least == 1 else f"an integer of at least {least}")
        return value

    def optional_integer(self, key: str, *, least: int = 1) -> int | None:
        return None if self.get(key) is None else self.integer(key, least=least)

    def number(self, key: str, default: float | None = None, *, least: float = 0.0, above: bool = True) -> float:
        """A finite number above `least`, or at least that."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        must = f"a number {'above' if above else 'of at least'} {least:g}"
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(key, must)
        try:
            result = float(value)
        except OverflowError:
            raise self.wrong(key, must) from None
        if not math.isfinite(result) or result < least or (above and result == least):
            raise self.wrong(key, must)
        return result

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def section(self, key: str) -> dict[str, Any]:
        """A JSON object; empty when there is none."""
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object of names and values")
        return value

    def integers(self, key: str) -> list[int] | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            raise self.wrong(key, "a list of integers")
        return value

    def strings(self, key: str) -> list[str] | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        return value

    def only(self, key: str, *allowed: Any, why: str) -> None:
        """Refuse a present value that is none of `allowed`, in a sentence that ends with `why`."""
        value = self.get(key)
        if value is not None and not any(value == item and type(value) is type(item) for item in allowed):
            raise ValueError(f"{key}={shown(value)} in config.json is not supported: {why}")
