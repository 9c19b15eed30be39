"""Shared style of the study figures, readable in greyscale, and inline SVG for the pages."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}
# Lines differ in lightness, dash and marker, so they can be distinguished without colour.
LINES: list[dict[str, Any]] = [
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#0b6fb8", "linestyle": "--", "marker": "s"},
    {"color": "#d1571b", "linestyle": "-.", "marker": "^"},
    {"color": "#3f8f63", "linestyle": ":", "marker": "D"},
    {"color": "#8a5fb5", "linestyle": (0, (5, 1, 1, 1)), "marker": "v"},
    {"color": "#777777", "linestyle": (0, (3, 3)), "marker": "x"},
    {"color": "#b08a00", "linestyle": (0, (1, 1)), "marker": "P"},
    {"color": "#b04a8f", "linestyle": (0, (8, 2)), "marker": "*"},
]


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **subplots: Any) -> tuple[Figure, Any]:
    """A figure of ``width`` x ``height`` inches, and its axes as a 2-D array."""
    with matplotlib.rc_context(STYLE):
        result = Figure(figsize=(width, height), layout="constrained")
        return result, result.subplots(rows, columns, squeeze=False, **subplots)


def save(result: Figure, path: Path, dpi: int = 110) -> None:
    """Save a PNG sized for a README. The file is byte-identical if the picture does not change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        result.savefig(path, dpi=dpi, facecolor="white", metadata={"Software": None})


def inline(result: Figure, label: str) -> str:
    """The figure as an SVG element for a page, without any URL."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}):
        result.savefig(buffer, format="svg", facecolor="white")
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", head, flags=re.DOTALL)
    return f'{head} role="img">{rest}'
