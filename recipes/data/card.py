"""The data card and the statistics of prepared data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.data.filters import write_json
from recipes.data.preparation import Outcome, PrepareConfig


def statistics(outcome: Outcome) -> dict[str, Any]:
    """Counts, lengths and kinds of answers."""
    tokens = sorted(outcome.tokens)
    quantiles = (
        {f"p{q}": tokens[min(len(tokens) - 1, q * len(tokens) // 100)] for q in (5, 50, 95, 99)} if tokens else {}
    )
    return {
        "rows": outcome.read,
        "train": outcome.train,
        "heldout": outcome.heldout,
        "dropped": dict(sorted(outcome.dropped.items())),
        "prompt_tokens": {**quantiles, "max": tokens[-1]} if tokens else {},
        "answers": dict(sorted(outcome.answers.items())),
        "sources": {Path(name).name: digest for name, digest in outcome.sources.items()},
    }


def write_card(out: Path, config: PrepareConfig, outcome: Outcome) -> None:
    """``stats.json`` and ``README.md``. Paths appear without their directories."""
    numbers = statistics(outcome)
    examples = {reason: [_short(where) for where in listed] for reason, listed in outcome.examples.items()}
    write_json(out / "stats.json", {**numbers, "examples": examples})
    settings = {key: _named(value) for key, value in asdict(config).items() if key != "out"}
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - {split: train, path: train.jsonl}",
        *(["  - {split: test, path: heldout.jsonl}"] if outcome.heldout else []),
        "---",
        "# Prepared problems",
        "",
        f"{outcome.train} training problems"
        + (f", {outcome.heldout} held out" if outcome.heldout else "")
        + f", of {outcome.read} rows. One JSON object per line: `id`, `problem`, `answer`, `source`.",
        "",
        "| dropped because | rows | for example |",
        "|---|---:|---|",
        *(f"| {reason} | {number} | {'; '.join(examples[reason][:2])} |" for reason, number in outcome.dropped.items()),
        "",
        f"Answers: {', '.join(f'{kind} {number}' for kind, number in numbers['answers'].items())}.",
    ]
    if tokens := numbers["prompt_tokens"]:
        lines += ["", f"Prompt tokens: {', '.join(f'{name} {value}' for name, value in tokens.items())}."]
    lines += ["", "Sources (SHA-256):", ""]
    lines += [f"- `{name}` {digest}" for name, digest in numbers["sources"].items()]
    lines += ["", "Made by `python -m recipes.prepare_data` with", ""]
    lines += [f"    {key}={value}" for key, value in settings.items()]
    (out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _named(value: Any) -> Any:
    if isinstance(value, list):
        return "[" + ",".join(Path(item).name for item in value) + "]"
    return Path(value).name if isinstance(value, str) and "/" in value and "{" not in value else value


def _short(where: str) -> str:
    """``/long/path/data.jsonl, line 3: ...`` without the directories."""
    return where.rpartition("/")[2].replace("|", "\\|").replace("\n", " ")[:160]
