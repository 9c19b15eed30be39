"""Self-contained HTML pages without scripts or network requests. All text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Row:
    cells: Sequence[str]
    mark: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    head: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    note: str = ""
    numbers: bool = True
    """Right-align all columns except the first."""


def write(
    path: Path, title: str, lead: Sequence[str], charts: Sequence[tuple[str, str]], tables: Sequence[Table]
) -> Path:
    """Write a page to ``path`` and return the path. ``charts`` are (caption, inline SVG) pairs."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("page.html.j2").render(
        title=title, lead=lead, charts=[(caption, Markup(svg)) for caption, svg in charts], tables=tables
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
