r"""Whether a short mathematical answer equals the reference answer.

Cheap, exact rules decide what they can (numbers, lists, tuples, intervals, words); the rest goes to math-verify, and
expressions that it holds for different are compared at random points. The rules are stricter than math-verify where it
accepts too much: several alternatives for one answer, chains of unequal numbers, letters taken for units.

Reads untrusted text with a grammar parser and a computer algebra system: only for the main thread of a process that may
be killed (`recipes.rewards.pool`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import product

from recipes.rewards.algebra import equal_by_algebra
from recipes.rewards.intervals import same_intervals
from recipes.rewards.latex import Exact, bracketed, clean, exact, split_top

MAX_SIGNS = 4  # \pm in one answer: 16 readings
_EQUALS = re.compile(r"(?<![<>!\\])=(?!=)")
_LIST = re.compile(r",|;|\\(?:q?quad|lor|land|vee|wedge)(?![A-Za-z])|\\text\{ ?(?:and|or) ?\}|\b(?:and|or)\b")
_GROUPS, _COMMA = re.compile(";"), re.compile(",")
_SPACE = re.compile(r"(?<!\d) | (?!\d)")  # 4 2 is not 42
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'. ,;&-]*")
_WORD_LIST = re.compile(r"\s*(?:,|;|&|\band\b|\bor\b)\s*")
_LETTERS = re.compile(
    r"\\(?:frac|sqrt|pi|infty|times|cdot|pm|ldots|circ|overline|ln|log|sin|cos|tan|cot|text)(?![A-Za-z])"
)
_FUNCTION = re.compile(r"([A-Za-z]\w?)\(([A-Za-z])\)")
_QUANTITY = re.compile(
    r"(.*?)(?: ?\\(?:text|mathrm|mbox|textrm)\{([^{}]{1,40})\}| ?([A-Za-z]{2}[A-Za-z ]{0,40})| ([A-Za-z]))"
    r"(?:\^\{?([23])\}?)?"
)
_UNIT_NAMES = {
    name: names.split()[0]
    for names in (
        "m meter meters metre metres|cm centimeter centimeters centimetre centimetres|mm millimeter millimeters",
        "km kilometer kilometers kilometre kilometres|ft foot feet|in inch inches|yd yard yards|mi mile miles",
        "s sec second seconds|min minute minutes|h hr hour hours|day days|week weeks|month months|year years",
        "g gram grams|kg kilogram kilograms|lb lbs pound pounds|l liter liters litre litres|ml milliliter milliliters",
        "dollar dollars|cent cents|euro euros|mph|km/h kmph|m/s|degree degrees",
    )
    for names in names.split("|")
    for name in names.split()
}
_CANONICAL = set(_UNIT_NAMES.values())
_MATRIX = re.compile(r"\\begin\{([bpvBV]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}", re.DOTALL)


def math_equal(answer: str, gold: str) -> bool:
    """Whether a bare answer equals a bare reference answer."""
    a, g = clean(answer), clean(gold)
    return a != "" and g != "" and _equal(a, g)


def _equal(a: str, g: str) -> bool:
    for rule in _RULES:
        decided = rule(a, g)
        if decided is not None:
            return decided
    return equal_by_algebra(a, g)


# ------------------------------------------------------------- rules: True, False, or None for "the next one decides"


def _same_text(a: str, g: str) -> bool | None:
    return True if a == g or _SPACE.sub("", a) == _SPACE.sub("", g) else None


def _numbers(a: str, g: str) -> bool | None:
    if a.endswith("%") and g.endswith("%"):
        a, g = (text.rstrip("%").rstrip("\\").strip() for text in (a, g))
    x, y = exact(a), exact(g)
    return x.equals(y) if x is not None and y is not None else None


def _units(a: str, g: str) -> bool | None:
    """A number with a unit equals the number alone, and the number with the same unit."""
    x, y = _quantity(a, marked=False), _quantity(g, marked=True)
    if x is None or y is None or not (x[1] or y[1]):
        return None
    if x[1] and y[1] and x[1] != y[1] and (x[1].split("^")[0] in _CANONICAL or y[1].split("^")[0] in _CANONICAL):
        return False
    return x[0].equals(y[0]) if x[1] == y[1] or not (x[1] and y[1]) else None


def _quantity(text: str, *, marked: bool) -> tuple[Exact, str] | None:
    """(number, unit or ""). ``marked``: a bare letter behind the number is a variable, and no unit."""
    if (number := exact(text)) is not None:
        return number, ""
    m = _QUANTITY.fullmatch(text)
    number = exact(m[1]) if m else None
    if m is None or number is None:
        return None
    unit = " ".join((m[2] or m[3] or m[4]).casefold().split()).rstrip(".")
    if not m[2] and (marked and m[4] or len(unit) < 3 and unit not in _UNIT_NAMES):
        return None
    return number, _UNIT_NAMES.get(unit, unit) + (f"^{m[5]}" if m[5] else "")


def _words(a: str, g: str) -> bool | None:
    """Text is compared word for word, lists of texts in any order; ``(A)`` is ``A``."""
    x, y = _plain(a), _plain(g)
    if _WORDS.fullmatch(x) is None or _WORDS.fullmatch(y) is None:
        return None
    if len(x) == 1 and len(y) == 1 and x.isalpha() and (a, g) == (x, y) and x != y:
        return x.upper() == y.upper() and x.upper() in "ABCDEFGH"  # options, not variables
    parts = [sorted(" ".join(p.split()) for p in _WORD_LIST.split(text.casefold()) if p.strip()) for text in (x, y)]
    if parts[0] == parts[1]:
        return True
    return False if "\\text" in g or len(y.split()[0]) > 3 else None  # letters may be a product of variables


def _plain(text: str) -> str:
    text = _WRAPPED.sub(r"\1", text).strip().rstrip(".").strip()
    if len(text) == 3 and text[0] == "(" and text[2] == ")":
        text = text[1]
    return text


def _signs(a: str, g: str) -> bool | None:
    r"""``\pm`` means both signs; every ``\pm`` of an answer chooses its own."""
    if "\\pm" not in a and "\\pm" not in g:
        return None
    x, y = _expanded(a), _expanded(g)
    if x is None or y is None or (len(x) == len(y) == 1):
        return None
    return True if _same_items(x, y, ordered=False) else None


def _expanded(text: str) -> list[str] | None:
    """All readings of all alternatives, without repetitions."""
    inner = bracketed(text)
    if inner and inner[0] == r"\{":
        text = inner[1]
    readings = []
    for item in _alternatives(text):
        count = item.count("\\pm")
        if count > MAX_SIGNS:
            return None
        for signs in product("+-", repeat=count):
            reading = item
            for sign in signs:
                reading = reading.replace("\\pm", sign, 1)
            readings.append(clean(re.sub(r"(^|[(\[,{=])\+", r"\1", reading)))
    return list(dict.fromkeys(readings))


def _lists(a: str, g: str) -> bool | None:
    """The same number of alternatives as the reference."""
    x, y = _alternatives(a), _alternatives(g)
    if len(x) == len(y) == 1:
        return None
    if len(x) > 1 and len(y) == 1:
        inner = bracketed(g)
        if inner and inner[0] == r"\{":
            return _same_items(x, _alternatives(inner[1]), ordered=False)
        x = list(dict.fromkeys(x))
        if len(x) == 1:
            return _equal(x[0], g)
        return True if same_intervals(a, g, _equal) else False if not (inner or _MATRIX.search(g)) else None
    if len(x) == 1:
        inner = bracketed(a)
        if inner and inner[0] == r"\{":
            return _same_items(_alternatives(inner[1]), y, ordered=False)
        if len(set(y)) == 1:
            return _equal(a, y[0])
        return True if same_intervals(a, g, _equal) else None
    named = [_names(items) for items in (x, y)]
    if named[0] and not named[1] or named[1] and not named[0]:
        return len(x) == len(y) and _same_items(list(map(_value, x)), list(map(_value, y)), ordered=True)
    return _same_items(list(dict.fromkeys(x)), list(dict.fromkeys(y)), ordered=False)


def _alternatives(text: str) -> list[str]:
    """Parts of a list. ``p=5,q=2;p=7,q=2`` has two, each a tuple."""
    groups = [group for group in split_top(text, _GROUPS) if group]
    if len(groups) > 1:
        members = [split_top(group, _COMMA) for group in groups]
        if all(len(group) > 1 and _names(group) for group in members):
            return [f"({','.join(map(_value, group))})" for group in members]
    parts = [part.strip(" $") for part in split_top(text, _LIST)]
    return [part for part in parts if part] or [text]


def _names(items: Sequence[str]) -> bool:
    return all(len(parts := split_top(item, _EQUALS)) == 2 and _open(parts[0]) for item in items)


def _value(item: str) -> str:
    return split_top(item, _EQUALS)[-1]


def _same_items(x: Sequence[str], y: Sequence[str], *, ordered: bool) -> bool:
    if len(x) != len(y) or len(x) > 64:
        return False
    if ordered:
        return all(map(_equal, x, y))
    left = list(x)
    for wanted in y:
        found = next((item for item in left if _equal(item, wanted)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _equations(a: str, g: str) -> bool | None:
    """``x=5`` is 5. In a chain every side without a letter must equal the last: ``3=4=5`` has no value."""
    x, y = split_top(a, _EQUALS), split_top(g, _EQUALS)
    if not all(x) or not all(y):
        return False if len(x) > 1 and not all(x) else None
    if len(x) == 1 and len(y) == 1:
        return None
    if not all(_open(side) or _equal(side, x[-1]) for side in x[:-1]):
        return False
    if len(y) == 1:
        return _equal(x[-1], g)
    functions = [_FUNCTION.fullmatch(sides[0]) for sides in (x, y)]
    if functions[1] and not functions[0] and len(x) == 1:
        return _equal(a, y[-1])
    if functions[0] and functions[1]:
        variable, own = functions[1][2], functions[0][2]
        renamed = x[-1] if own == variable else re.sub(rf"(?<![A-Za-z\\]){own}(?![A-Za-z])", variable, x[-1])
        return functions[0][1] == functions[1][1] and _equal(renamed, y[-1])
    if len(x) == 1 and _identifier(y[0]):
        return _equal(a, y[-1])
    if len(x) > 1 and _identifier(x[0]) and _identifier(y[0]):
        return x[0].replace(" ", "") == y[0].replace(" ", "") and _equal(x[-1], y[-1])
    return None


def _open(side: str) -> bool:
    """Whether a side of an equation has a letter, and so is not a plain number."""
    bare = _LETTERS.sub(" ", side)
    return re.search(r"[A-Za-z]", re.sub(r"\\(?=[A-Za-z])", "", bare)) is not None or "\\text" in side


def _identifier(side: str) -> bool:
    return (
        re.fullmatch(r"\\?[A-Za-z]+(?:_(?:\w|\{[^{}]*\}))?'?|\\?(?:angle|triangle) ?[A-Z]+", side.strip()) is not None
    )


def _brackets(a: str, g: str) -> bool | None:
    """Tuples and intervals item by item with the same brackets, sets in any order."""
    x, y = bracketed(_row(a)), bracketed(_row(g))
    if x is None or y is None:
        return None
    kind = {r"\langle": "(", r"\rangle": ")"}
    if (kind.get(x[0], x[0]), kind.get(x[2], x[2])) != (kind.get(y[0], y[0]), kind.get(y[2], y[2])):
        return True if same_intervals(a, g, _equal) else False
    items = [split_top(inside, re.compile(",|;")) for inside in (x[1], y[1])]
    if len(items[0]) == len(items[1]) == 1:
        return None
    return _same_items(items[0], items[1], ordered=x[0] != r"\{") or (same_intervals(a, g, _equal) and True)


def _row(text: str) -> str:
    """A matrix of one column or one row as a tuple."""
    m = _MATRIX.fullmatch(text)
    if m is None:
        return text
    rows = [row for row in re.split(r"\\\\|\\cr\b", m[2]) if row.strip()]
    if len(rows) == 1:
        rows = rows[0].split("&")
    return text if len(rows) < 2 or any("&" in row for row in rows) else f"({','.join(row.strip() for row in rows)})"


def _sets(a: str, g: str) -> bool | None:
    return True if same_intervals(a, g, _equal) else None


def _angles(a: str, g: str) -> bool | None:
    r"""Degrees against radians, where exactly one side has degrees and the other a multiple of pi."""
    for degrees, radians in ((a, g), (g, a)):
        if degrees.endswith("^\\circ") and "\\circ" not in radians and "\\pi" in radians:
            value = exact(degrees.removesuffix("^\\circ"))
            return value is not None and equal_by_algebra(
                rf"\frac{{{value.value.numerator} \pi}}{{{180 * value.value.denominator}}}", radians
            )
    if a.endswith("^\\circ") or g.endswith("^\\circ"):
        x, y = (text.removesuffix("^\\circ") for text in (a, g))
        return _equal(x, y) if exact(x) and exact(y) else None
    return None


_RULES: tuple[Callable[[str, str], bool | None], ...] = (
    _same_text,
    _numbers,
    _units,
    _words,
    _signs,
    _lists,
    _equations,
    _brackets,
    _angles,
    _sets,
)
