"""Equality of two expressions by math-verify, and by their values at random points.

Reads untrusted text: see `recipes.rewards.equality`. sympy and math-verify are imported at the first use.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

POINTS, NEEDED = 24, 6  # tried, and those where both must be real


def equal_by_algebra(a: str, g: str) -> bool:
    """math-verify on answers that the rules do not decide. Letters are not units if both sides parse with them."""
    from math_verify import verify
    from sympy import Basic, MatrixBase

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off
    x, y = _parsed(a, False), _parsed(g, False)
    if isinstance(x, Basic) and isinstance(y, Basic) and (x.free_symbols or y.free_symbols):
        if not isinstance(x, MatrixBase) and _variables(x) and _variables(y):
            return bool(verify(y, x, timeout_seconds=None)) or _agree_at_points(x, y)
    x, y = _parsed(a, True), _parsed(g, True)
    if x is None or y is None:
        return False
    return bool(verify(y, x, timeout_seconds=None))


@lru_cache(maxsize=4096)  # the reference answer is asked for once per sample
def _parsed(text: str, units: bool) -> Any:
    """A sympy object, or the text that math-verify falls back to, or None."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    from sympy import Basic, MatrixBase

    configs: list[Any] = [LatexExtractionConfig(), ExprExtractionConfig()]
    if not units:
        from latex2sympy2_extended import NormalizationConfig

        as_written = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="all")
        configs[0] = LatexExtractionConfig(normalization_config=as_written)
    found = parse(text if "$" in text else f"${text}$", configs, parsing_timeout=None)
    return next((item for item in found if isinstance(item, (Basic, MatrixBase))), found[0] if found else None)


def _variables(expression: Any) -> bool:
    """Only letters, with or without index, no words that the parser took for symbols."""
    return all(len(str(symbol).split("_")[0].lstrip("\\")) == 1 for symbol in expression.free_symbols)


def _agree_at_points(x: Any, y: Any) -> bool:
    """Equal as functions: at random points of the reals both are real and equal to 12 digits, or neither is real."""
    from sympy import Expr, lambdify

    symbols = sorted(x.free_symbols | y.free_symbols, key=str)
    if not (isinstance(x, Expr) and isinstance(y, Expr)) or not 1 <= len(symbols) <= 8:
        return False
    if {str(s) for s in x.free_symbols} != {str(s) for s in y.free_symbols}:
        return False
    try:
        functions = [
            lambdify([str(s) for s in symbols], e.subs({s: _plain_symbol(s) for s in symbols}), "mpmath")
            for e in (x, y)
        ]
    except Exception:  # what sympy cannot print has no values
        return False
    return _compare_values(functions, len(symbols))


def _plain_symbol(symbol: Any) -> Any:
    from sympy import Symbol

    return Symbol(str(symbol))


def _compare_values(functions: Sequence[Callable[..., Any]], arguments: int) -> bool:
    import mpmath

    rng, real = random.Random(0), 0
    with mpmath.workdps(30):
        for attempt in range(POINTS):
            scale = (1, 3, 0.9)[attempt % 3]
            point = [
                mpmath.mpf(rng.uniform(0.05, scale) * (1 if attempt % 2 else rng.choice((1, -1))))
                for _ in range(arguments)
            ]
            values = []
            for function in functions:
                try:
                    values.append(mpmath.mpmathify(function(*point)))
                except (ZeroDivisionError, ValueError, OverflowError, TypeError, NameError, AttributeError):
                    values.append(mpmath.mpf("nan"))
            are_real = [bool(mpmath.isfinite(v)) and abs(mpmath.im(v)) < mpmath.mpf(10) ** -20 for v in values]
            if are_real[0] != are_real[1]:
                return False
            if are_real[0]:
                u, v = (mpmath.re(value) for value in values)
                if abs(u - v) > mpmath.mpf(10) ** -12 * max(1, abs(u), abs(v)):
                    return False
                real += 1
    return real >= NEEDED
