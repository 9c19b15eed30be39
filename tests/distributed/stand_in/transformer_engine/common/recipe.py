"""Recipes: how operands are scaled before they are rounded to float8."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Format(Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


@dataclass(init=False)
class Recipe:
    fp8_format: Format

    def __init__(self, fp8_format: Format = Format.HYBRID, **_: Any) -> None:
        self.fp8_format = fp8_format


class DelayedScaling(Recipe):
    """One scale per tensor, from the largest magnitudes of earlier forward passes."""

    def __init__(self, *, amax_history_len: int = 1024, amax_compute_algo: str = "max", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        assert amax_compute_algo == "max", amax_compute_algo
        self.amax_history_len = amax_history_len


class Float8CurrentScaling(Recipe):
    """One scale per tensor, from its present largest magnitude."""


class Float8BlockScaling(Recipe):
    """One scale per 1 x 128 values of an activation and per 128 x 128 values of a weight."""


class MXFP8BlockScaling(Recipe):
    """One scale per 32 values."""
