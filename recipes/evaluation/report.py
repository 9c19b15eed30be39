"""Write an evaluation as Markdown and HTML pages: estimates, counts, and every problem with its completions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from recipes.evaluation.results import SetResult

PAGE_CHARS = 20_000_000  # maximum characters of completions on one page; above it, each completion is shortened
LEAST_CHARS = 400  # shown of every completion, at least


def markdown(model: str, results: Sequence[SetResult]) -> str:
    """A Markdown document with one table per set."""
    lines = [f"# Evaluation of {model}", ""]
    for result in results:
        p = result.evaluated.protocol
        lines += [
            f"## {result.evaluated.name}",
            "",
            f"{result.title[0].upper()}{result.title[1:]}.",
            "",
            f"Temperature {p.temperature:g}, top-p {p.top_p:g}, top-k {p.top_k or 'off'}, "
            f"at most {p.max_tokens} tokens, verifier `{p.reward}`, prompt `{_one_line(p.template)}`.",
            "",
            "| metric | mean | 95 % over problems | 95 % over seeds |",
            "|---|---:|---:|---:|",
        ]
        for name, e in result.estimates.items():
            seeds = "" if e.seed_low is None else f"{e.seed_low:.3f} – {e.seed_high:.3f}"
            lines.append(f"| {name} | {e.mean:.3f} | {e.low:.3f} – {e.high:.3f} | {seeds} |")
        lines += ["", *(f"> {warning}" for warning in result.warnings), ""]
    return "\n".join(lines).rstrip() + "\n"


def write_pages(out: Path, model: str, results: Sequence[SetResult]) -> Path:
    """Write ``index.html`` and one page per set to ``out``. Returns the path of ``index.html``.

    Pages are self-contained, and all model output is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("page.html.j2")
    for result in results:
        page = template.render(model=model, results=[result], rows=[_shown(result, row) for row in result.rows])
        _replace(out / f"{result.evaluated.name}.html", page)
    index = out / "index.html"
    _replace(index, template.render(model=model, results=results, rows=None))
    return index


def _shown(result: SetResult, row: dict[str, Any]) -> dict[str, Any]:
    most = max(LEAST_CHARS, PAGE_CHARS // max(result.responses, 1))
    samples = [{**s, "text": s["text"][:most], "cut": len(s["text"]) > most} for s in row["samples"]]
    correct = sum(s["correct"] for s in samples)
    state = "solved" if correct == len(samples) else "mixed" if correct else "unsolved"
    return {**row, "samples": samples, "correct": correct, "state": state}


def _replace(path: Path, text: str) -> None:
    """Replace the file atomically. Lone surrogates, which a model can generate, become question marks."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="replace")
    partial.replace(path)


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("|", "\\|")
