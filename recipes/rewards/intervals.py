r"""Sets of real numbers as unions of intervals: ``(-\infty,3)\cup[5,7]``, ``x<3 or 5\le x\le 7``, ``\{x|x<3\}``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from recipes.rewards.latex import bracketed, exact, split_top

MAX_PARTS = 16
_UNION = re.compile(r"\\cup(?![A-Za-z])|\\text\{ ?or ?\}|\bor\b|\\lor(?![A-Za-z])|\\vee(?![A-Za-z])|,")
_MINUS = re.compile(r"\\setminus(?![A-Za-z])|\\backslash(?![A-Za-z])|-(?=\\\{)")
_RELATION = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<|>")
_BUILDER = re.compile(
    r"(?:([A-Za-z])(?:\\in(?: ?\\mathbb\{?R\}?| ?\\mathrm\{?R\}?))?) ?(?:\||\\mid|:|\\vert) ?(.*)", re.DOTALL
)
_MEMBER = re.compile(r"([A-Za-z]) ?\\in ?(.*)", re.DOTALL)
_REALS = re.compile(r"\\mathbb\{?\s*R\}?|\\mathbf\{R\}|\\R")
INFINITE = "\\infty"

Equal = Callable[[str, str], bool]


@dataclass(frozen=True)
class Interval:
    """``low`` and ``high`` as cleaned text; infinite ends are open."""

    low: str
    low_closed: bool
    high: str
    high_closed: bool


@dataclass(frozen=True)
class RealSet:
    """A union of intervals; the name of its variable, where it has one."""

    parts: tuple[Interval, ...]
    variable: str | None
    form: str  # "interval" | "relation" | "builder": how it was written


def same_intervals(a: str, g: str, equal: Equal) -> bool:
    """Whether both texts are the same union of intervals. A pair ``(1,2)`` may also be a point, so one of the two texts
    must be written in another form."""
    x, y = real_set(a), real_set(g)
    if x is None or y is None or len(x.parts) != len(y.parts):
        return False
    if x.variable is not None and y.variable is not None and x.variable != y.variable:
        return False
    left = list(x.parts)
    for wanted in y.parts:
        found = next((part for part in left if _same(part, wanted, equal)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _same(p: Interval, q: Interval, equal: Equal) -> bool:
    closed = (p.low_closed, p.high_closed) == (q.low_closed, q.high_closed)
    return closed and all(_same_end(a, b, equal) for a, b in ((p.low, q.low), (p.high, q.high)))


def _same_end(a: str, b: str, equal: Equal) -> bool:
    if INFINITE in a or INFINITE in b:
        return a == b
    return equal(a, b)


def real_set(text: str) -> RealSet | None:
    """None for anything that is not written as a set of reals."""
    text = text.strip()
    variable, form = None, "interval"
    if m := _MEMBER.fullmatch(text):
        variable, text = m[1], m[2].strip()
    pieces = [piece for piece in split_top(text, _MINUS)]
    if len(pieces) == 2 and pieces[0] and pieces[1]:
        return _without(pieces[0], pieces[1], variable)
    parts: list[Interval] = []
    for piece in split_top(text, _UNION)[: MAX_PARTS + 1]:
        read = _piece(piece)
        if read is None:
            return None
        part, own, how = read
        if own is not None and variable not in (None, own):
            return None
        variable, form = own or variable, how if how != "interval" else form
        parts += part
    if not parts or len(parts) > MAX_PARTS:
        return None
    return RealSet(_merged(parts), variable, form)


def _piece(text: str) -> tuple[list[Interval], str | None, str] | None:
    if _REALS.fullmatch(text):
        return [Interval("-" + INFINITE, False, INFINITE, False)], None, "interval"
    inner = bracketed(text)
    if inner and inner[0] == r"\{":
        m = _BUILDER.fullmatch(inner[1])
        found = real_set(m[2]) if m else None
        if m is None or found is None or found.variable not in (None, m[1]):
            return None
        return list(found.parts), m[1], "builder"
    if inner and inner[0] in "([" and inner[2] in ")]":
        ends = split_top(inner[1], re.compile(","))
        if len(ends) != 2 or not all(ends):
            return None
        low, high = ends
        return [Interval(low, inner[0] == "[", high, inner[2] == "]")], None, "interval"
    return _relation(text)


def _relation(text: str) -> tuple[list[Interval], str, str] | None:
    r"""``x<3``, ``3>x``, ``1\le x<2``."""
    signs = [m[0] for m in _RELATION.finditer(text)]
    sides = [side.strip() for side in _RELATION.split(text)]
    if not 1 <= len(signs) <= 2 or not all(sides) or any("=" in side for side in sides):
        return None
    if signs[0] in (">", r"\ge"):  # read from right to left
        if any(sign not in (">", r"\ge") for sign in signs):
            return None
        flipped = {">": "<", r"\ge": r"\le"}
        sides, signs = sides[::-1], [flipped[sign] for sign in signs[::-1]]
    elif any(sign in (">", r"\ge") for sign in signs):
        return None
    middle = [i for i, side in enumerate(sides) if re.fullmatch(r"[A-Za-z]", side)]
    if len(signs) == 2:
        if not re.fullmatch(r"[A-Za-z]", sides[1]):
            return None
        part = Interval(sides[0], signs[0] == r"\le", sides[2], signs[1] == r"\le")
        return [_open_ends(part)], sides[1], "relation"
    if len(middle) != 1:
        return None
    closed = signs[0] == r"\le"
    if middle[0] == 0:
        return [Interval("-" + INFINITE, False, sides[1], closed)], sides[0], "relation"
    return [Interval(sides[0], closed, INFINITE, False)], sides[1], "relation"


def _open_ends(part: Interval) -> Interval:
    return Interval(
        part.low,
        part.low_closed and INFINITE not in part.low,
        part.high,
        part.high_closed and INFINITE not in part.high,
    )


def _without(base: str, removed: str, variable: str | None) -> RealSet | None:
    r"""``A \setminus \{1, 2\}`` with exact numbers: the intervals of A are cut at these points."""
    found, inner = real_set(base), bracketed(removed)
    if found is None or inner is None or inner[0] != r"\{":
        return None
    points = [point for point in split_top(inner[1], re.compile(","))]
    parts = list(found.parts)
    for point in points:
        value = exact(point)
        if value is None:
            return None
        cut: list[Interval] = []
        for part in parts:
            low, high = _number(part.low), _number(part.high)
            if low is None or high is None:
                return None
            if low < value.value < high:
                cut += [
                    Interval(part.low, part.low_closed, point, False),
                    Interval(point, False, part.high, part.high_closed),
                ]
            elif value.value == low:
                cut.append(Interval(part.low, False, part.high, part.high_closed))
            elif value.value == high:
                cut.append(Interval(part.low, part.low_closed, part.high, False))
            else:
                cut.append(part)
        parts = cut
    return RealSet(tuple(parts), found.variable or variable, "interval")


_BIG = Fraction(10) ** 400


def _number(text: str) -> Fraction | None:
    if text in (INFINITE, "-" + INFINITE):
        return -_BIG if text.startswith("-") else _BIG
    found = exact(text)
    return found.value if found else None


def _merged(parts: list[Interval]) -> tuple[Interval, ...]:
    """Touching and overlapping intervals with exact ends made one, in ascending order; else as they are."""
    if any(_number(part.low) is None or _number(part.high) is None for part in parts):
        return tuple(parts)
    ordered = sorted(parts, key=lambda p: (_number(p.low), not p.low_closed))
    merged = [ordered[0]]
    for part in ordered[1:]:
        last = merged[-1]
        last_high, low, high = _number(last.high), _number(part.low), _number(part.high)
        assert last_high is not None and low is not None and high is not None
        if low > last_high or (low == last_high and not (part.low_closed or last.high_closed)):
            merged.append(part)
        elif high > last_high or (high == last_high and part.high_closed):
            merged[-1] = Interval(last.low, last.low_closed, part.high, part.high_closed)
    return tuple(merged)
