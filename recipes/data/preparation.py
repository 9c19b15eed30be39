"""Keys and counts of a preparation of training data (`recipes.data.prepare`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

EXAMPLES = 5  # of each reason, for the card


@dataclass
class PrepareConfig:
    """Keys of ``python -m recipes.prepare_data``."""

    path: list[str] = field(default_factory=list)  # files and directories, in any format of docs/data.md
    out: str = ""  # directory to make: train.jsonl, heldout.jsonl, stats.json, README.md
    tokenizer: str | None = None  # Hugging Face directory; with it, prompts are measured in tokens
    template: str = "{problem}"  # as data.template; what is measured is what the model will see
    max_prompt_tokens: int | None = None  # longer prompts are dropped
    against: list[str] = field(default_factory=list)  # benchmarks: files, or directories with a file for each
    ngram: int = 9  # words; a problem that shares one with a benchmark is dropped
    overlap: int = 1  # shared n-grams that it takes
    rates: str | None = None  # a run's journal, an evaluation's completions, or rows with id and pass_rate
    min_rate: float = 0.0  # pass rates must be above
    max_rate: float = 1.0  # and below
    unrated: str = "drop"  # problems without a pass rate: "drop" | "keep"
    heldout: int = 0  # problems split off, by hash of their text
    bad: str = "stop"  # rows that are no problems: "stop" | "drop"
    seed: int = 0  # of the split


@dataclass
class Outcome:
    """Counts of rows by result."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    train: int = 0
    heldout: int = 0
    tokens: list[int] = field(default_factory=list)  # of every kept prompt, if measured
    answers: Counter[str] = field(default_factory=Counter)  # kinds
    sources: dict[str, str] = field(default_factory=dict)  # file -> SHA-256

    def drop(self, reason: str, where: str) -> None:
        self.dropped[reason] += 1
        listed = self.examples.setdefault(reason, [])
        if len(listed) < EXAMPLES:
            listed.append(where)
