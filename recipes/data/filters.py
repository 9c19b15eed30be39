"""Filters of training data: contamination by benchmarks, and pass rates."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from recipes.data import files

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """The words of n-grams: letters and digits only, without case."""
    return _WORD.findall(text.casefold())


class Contamination:
    """N-grams of words of benchmark problems. Texts shorter than n words are compared whole."""

    def __init__(self, problems: Iterable[tuple[str, str]], n: int) -> None:
        """``problems``: (benchmark, text)."""
        self.n = n
        self._grams: dict[str, str] = {}
        for name, text in problems:
            for gram in self._of(text):
                self._grams.setdefault(gram, name)

    def _of(self, text: str) -> Iterator[str]:
        found = words(text)
        if 0 < len(found) < self.n:
            yield " ".join(found)
        for start in range(len(found) - self.n + 1):
            yield " ".join(found[start : start + self.n])

    def source(self, text: str, overlap: int = 1) -> str | None:
        """The benchmark that shares at least ``overlap`` n-grams with ``text``; None if there is none."""
        shared = Counter(self._grams[gram] for gram in set(self._of(text)) if gram in self._grams)
        if not shared:
            return None
        name, count = shared.most_common(1)[0]
        return name if count >= overlap or len(words(text)) < self.n else None


def pass_rates(path: Path) -> dict[str, tuple[float, int]]:
    """Problem id -> (share of correct responses, responses), from what generated and judged them.

    Reads the ``journal.jsonl`` of a run, the ``completions/*.jsonl`` of an evaluation, or rows with ``id`` and
    ``pass_rate`` (and optionally ``n``). Raises ValueError for anything else, naming file and line.
    """
    correct: defaultdict[str, int] = defaultdict(int)
    total: defaultdict[str, int] = defaultdict(int)
    given: dict[str, tuple[float, int]] = {}
    for where, row in files.rows(path):
        try:
            if not isinstance(row, dict):
                raise KeyError("id")
            if "groups" in row:
                for group in row["groups"]:
                    correct[group["problem"]] += sum(bool(r["correct"]) for r in group["responses"])
                    total[group["problem"]] += len(group["responses"])
            elif "samples" in row:
                correct[row["id"]] += sum(bool(s["correct"]) for s in row["samples"])
                total[row["id"]] += len(row["samples"])
            elif "pass_rate" in row:
                rate = float(row["pass_rate"])
                if not 0 <= rate <= 1:
                    raise ValueError(f"{where}: pass_rate={rate} is not a share between 0 and 1")
                given[str(row["id"])] = (rate, int(row.get("n", 1)))
            elif "evaluation" not in row and row.get("kind") != "eval":
                raise KeyError("pass_rate")
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{where}: no {error} there; give a run's journal.jsonl, completions of an evaluation, or rows with id "
                "and pass_rate"
            ) from error
    return given | {name: (correct[name] / count, count) for name, count in total.items() if count}


def write_json(path: Path, value: Any) -> None:
    """Indented, with a newline at the end."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
