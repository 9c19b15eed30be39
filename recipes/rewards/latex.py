r"""Short mathematical answers as text: one spelling for each, exact numbers, top-level parts.

Plain string work in linear time. Nothing here decides what is equal; `recipes.rewards.equality` does.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 1000  # of an exact number; Python refuses to read many more, and powers stay small
_SYMBOLS = {
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "π": r"\pi ",
    "√": r"\sqrt ",
    "°": r"^\circ ",
    "−": "-",
    "–": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": "/",
    "⁄": "/",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "±": r"\pm ",
    "∠": r"\angle ",
    "…": r"\ldots ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
}
_WORDS = {
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\cfrac": r"\frac",
    r"\leqslant": r"\le",
    r"\geqslant": r"\ge",
    r"\leq": r"\le",
    r"\geq": r"\ge",
    r"\lt": "<",
    r"\gt": ">",
    r"\neq": r"\ne",
    r"\degree": r"^\circ",
    r"\infin": r"\infty",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\lbrack": "[",
    r"\rbrack": "]",
    r"\dots": r"\ldots",
    r"\cdots": r"\ldots",
    r"\arcsinh": r"\operatorname{arcsinh}",
}
_DROPPED = (r"\left", r"\right", r"\displaystyle", r"\bigl", r"\bigr", r"\big", r"\Big", r"\limits", r"\nolimits")
_SPACES = re.compile(r"(?<!\\)\\[,;:! ]|~|\s+")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_GROUPED = re.compile(r"(?<=\d)(?:\{,\}|\\[,!]\s?|,\\!)(?=\d{3}(?!\d))")  # 10{,}000  10\,000
_COMMAS = re.compile(r"(?<![\d,(\[{.-])(?<!, )(-?\d{1,3}(?:,\d{3})+)(?![\d,)\]}])(?!\s*,)")  # 10,000, but not (10,000)
_FUNCTION_ARGUMENT = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc|ln|log)) ?([A-Za-z]) ?(?=\\(?:cdot|times)\b)")
_GROUP = re.compile(r"(?:\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox))?\{")
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_CIRCLE = re.compile(r"\^\s*\{?\s*\\circ\s*\}?")


def clean(text: str) -> str:
    r"""One spelling: no dollar signs around it, no sizes, ``\frac{1}{2}`` for ``½`` and ``\dfrac12``, ``10000`` for
    ``10{,}000``. Applying it twice changes nothing more."""
    text = text.replace(r"\$", "").strip()
    text = _GROUPED.sub("", _unicode(text))
    text = _COMMAS.sub(lambda m: m[1].replace(",", ""), text)
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            inner = text[len(opening) : -len(closing)]
            if opening not in inner:
                text = inner
    text = text.replace("!=", r"\ne ")
    text = _COMMAND.sub(lambda m: "" if m[0] in _DROPPED else _WORDS.get(m[0], m[0]), text)
    text = _CIRCLE.sub(r"^\\circ ", text)
    text = _SPACES.sub(" ", text)
    text = _brace_arguments(_FUNCTION_ARGUMENT.sub(r"\1(\2)", text))
    text = re.sub(r"(^|[(\[,={])\s*\+\s*(?=\\infty|\d|\.)", r"\1", text)  # +5, (+\infty
    text = re.sub(r" ?([,;()\[\]{}^_=<>+*/|-]) ?", r"\1", text)  # binary signs keep their meaning without spaces
    text = text.strip().rstrip(".").strip()
    while (group := _GROUP.match(text)) and text.endswith("}") and _one_group(text[group.end() - 1 :]):
        text = text[group.end() : -1].strip()
    return text


def _one_group(text: str) -> bool:
    """Whether the first brace closes at the end."""
    depth, position = 0, 0
    while position < len(text):
        depth += (text[position] == "{") - (text[position] == "}")
        position += 2 if text[position] == "\\" else 1
        if depth == 0:
            return position == len(text)
    return False


def _unicode(text: str) -> str:
    if text.isascii():
        return text
    out = []
    for character in text:
        if character in _SYMBOLS:
            out.append(_SYMBOLS[character])
        elif unicodedata.category(character) == "No" and "FRACTION" in unicodedata.name(character, ""):
            numerator, _, denominator = unicodedata.normalize("NFKC", character).partition("⁄")
            out.append(rf"\frac{{{numerator}}}{{{denominator}}}")
        elif character in "⁰¹²³⁴⁵⁶⁷⁸⁹⁻":
            out.append(character)
        else:
            out.append(unicodedata.normalize("NFKC", character))
    text = "".join(out)
    return _SUPERSCRIPTS.sub(lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}", text)


_BARE_ROOT = re.compile(r"\\sqrt\s*(\d+|[A-Za-z])(?![\w])")
_BARE_FRACTION = re.compile(r"\\frac\s*(\d|[A-Za-z]|\{[^{}]*\})\s*(\d|[A-Za-z]|\{[^{}]*\})")


def _brace_arguments(text: str) -> str:
    r"""``\frac12`` and ``\sqrt2`` with braces; nested ones are left to the parser."""
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text)
    return _BARE_FRACTION.sub(lambda m: rf"\frac{_braced(m[1])}{_braced(m[2])}", text)


def _braced(argument: str) -> str:
    return argument if argument.startswith("{") else "{" + argument + "}"


# ---------------------------------------------------------------------------------------------------- exact numbers


@dataclass(frozen=True, slots=True)
class Exact:
    """A rational number as written. ``digits``: significant ones of a decimal fraction, None for an exact form."""

    value: Fraction
    places: int | None = None
    digits: int = 0

    def equals(self, other: Exact) -> bool:
        """Equal, or one is a decimal of at least six significant digits that rounds the other."""
        if self.value == other.value:
            return True
        for rounded, exact in ((self, other), (other, self)):
            if rounded.places is not None and rounded.digits >= 6 and exact.places is None:
                if abs(rounded.value - exact.value) * 2 <= Fraction(1, 10**rounded.places):
                    return True
        return False


_UNSIGNED = r"(?:\d+(?:\.\d*)?|\.\d+)"
_INTEGER = re.compile(r"\d+")
_DECIMAL = re.compile(_UNSIGNED)
_RECURRING = re.compile(r"(\d*)\.(\d*)(?:\\overline|\\dot|\\bar)\{(\d+)\}")
_FRACTION = re.compile(rf"\\frac\{{(-?{_UNSIGNED})\}}\{{(-?{_UNSIGNED})\}}|({_UNSIGNED})/({_UNSIGNED})")
_MIXED = re.compile(r"(\d+)\\frac\{(\d+)\}\{(\d+)\}")
_POWER = re.compile(rf"(?:({_UNSIGNED})(?:\\times|\\cdot|\*)\s*)?(\d+)\^(?:\{{(-?\d+)\}}|(\d))")
_SCIENTIFIC = re.compile(rf"({_UNSIGNED})[eE]([-+]?\d+)")


_LOOSE = re.compile(r"(?<!\d) | (?!\d)")  # 4 2 is not 42


def exact(text: str) -> Exact | None:
    """A cleaned text as a rational number; None when it is anything else."""
    if len(text) > MAX_DIGITS:
        return None
    text = _LOOSE.sub("", text)
    while len(text) > 1 and text[0] in "{(" and text[-1] == {"{": "}", "(": ")"}[text[0]] and text[1:-1].isdigit():
        text = text[1:-1]
    negative = text.startswith("-")
    found = _unsigned(text[1:] if text[:1] in ("-", "+") else text)
    return Exact(-found.value, found.places, found.digits) if found and negative else found


def _unsigned(text: str) -> Exact | None:
    if _INTEGER.fullmatch(text):
        return Exact(Fraction(int(text)))
    if _DECIMAL.fullmatch(text):
        return _decimal(text)
    if m := _RECURRING.fullmatch(text):
        scale = 10 ** len(m[2])
        period = Fraction(int(m[3]), 10 ** len(m[3]) - 1) / scale
        return Exact(Fraction(int((m[1] or "0") + m[2]), scale) + period)
    if m := _FRACTION.fullmatch(text):
        above, below = (m[1], m[2]) if m[1] is not None else (m[3], m[4])
        return Exact(Fraction(above) / Fraction(below)) if Fraction(below) else None
    if (m := _MIXED.fullmatch(text)) and int(m[2]) < int(m[3]):
        return Exact(int(m[1]) + Fraction(int(m[2]), int(m[3])))
    if m := _POWER.fullmatch(text):
        base, exponent = int(m[2]), int(m[3] if m[3] is not None else m[4])
        if abs(exponent) * base.bit_length() > 4 * MAX_DIGITS or (base == 0 and exponent <= 0):
            return None
        factor = Fraction(m[1]) if m[1] else Fraction(1)
        return Exact(factor * Fraction(base) ** exponent)
    if (m := _SCIENTIFIC.fullmatch(text)) and abs(int(m[2])) <= MAX_DIGITS:
        return Exact(Fraction(m[1]) * Fraction(10) ** int(m[2]))
    return None


def _decimal(text: str) -> Exact:
    whole, _, decimals = text.partition(".")
    value = Fraction(int((whole or "0") + decimals), 10 ** len(decimals))
    if value.denominator == 1 and not decimals.strip("0"):
        return Exact(value)
    return Exact(value, len(decimals), len((whole + decimals).lstrip("0")))


# ---------------------------------------------------------------------------------------------------- parts of text

_OPEN, _CLOSE = "([{", ")]}"


def split_top(text: str, separators: re.Pattern[str]) -> list[str]:
    """Parts between separators that stand outside all brackets; the text itself when brackets do not match."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        character = text[position]
        if depth == 0 and (m := separators.match(text, position)) and m.end() > position:
            parts.append(text[start:position])
            position = start = m.end()
            continue
        if character == "\\" and position + 1 < len(text) and text[position + 1] in "{}":
            depth += 1 if text[position + 1] == "{" else -1
            position += 2
            continue
        depth += (character in _OPEN) - (character in _CLOSE)
        position += 2 if character == "\\" and not text[position + 1 : position + 2].isalpha() else 1
    return [part.strip() for part in [*parts, text[start:]]]


def bracketed(text: str) -> tuple[str, str, str] | None:
    r"""(opening, content, closing) when one pair of brackets holds the whole text: ``( )``, ``[ )``, ``\{ \}``."""
    for opening in (r"\{", r"\langle", "(", "["):
        if text.startswith(opening):
            break
    else:
        return None
    for closing in (r"\}", r"\rangle", ")", "]"):
        if text.endswith(closing):
            break
    else:
        return None
    if (opening == r"\{") != (closing == r"\}") or len(text) < len(opening) + len(closing):
        return None
    content = text[len(opening) : -len(closing)]
    depth, position = 0, 0
    while position < len(content):
        character = content[position]
        depth += (character in _OPEN) - (character in _CLOSE)
        position += 1
        if depth < 0:
            return None
    return opening, content.strip(), closing
