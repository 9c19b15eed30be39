"""``--help`` of the commands that take ``key=value`` words: their text, or the keys of a section."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from configs.load import GROUPS, choices
from recipes.checks import keys


def wants_help(argv: Sequence[str]) -> bool:
    return bool({"-h", "--help"} & set(argv))


def print_help(argv: Sequence[str], text: str) -> int:
    """Print ``text``, or the keys of the sections that follow ``--help``; the exit status.

    ``text`` may hold {recipe}, {loss}, {selection}, {schedule} (names that can be chosen) and {sections}.
    """
    try:
        asked = [keys.section_help(word) for word in argv if word not in ("-h", "--help") and "=" not in word]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = {group: choices(group) for group in GROUPS}
    papers = [name for name in names["recipe"] if "/" in name]
    own = [name for name in names["recipe"] if name not in papers]
    names["recipe"] = [*own, f"and {len(papers)} settings of the papers (docs/recipes.md)"]
    listed = {group: wrapped(", ".join(entries), indent=19) for group, entries in names.items()}
    print("\n\n".join(asked) or text.format(**listed, sections=wrapped(" ".join(keys.SECTIONS), indent=2)))
    return 0


def wrapped(words: str, *, indent: int) -> str:
    """``words`` over lines of at most 100 columns, those after the first indented."""
    return textwrap.fill(words, 100 - indent, subsequent_indent=" " * indent, break_on_hyphens=False)
