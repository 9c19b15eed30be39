"""The completions of one set on disk, one problem per line, so a killed evaluation can continue."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recipes.loop.evaluation import Answered


class CompletionLog:
    """``completions/<set>.jsonl``: a header that identifies the evaluation, then one line per problem, in any order.

    An evaluation continues only with the same ``identity``: model, problems, protocol, seed.

    Raises:
        ValueError: the file belongs to another evaluation, or a line other than the last is damaged.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.rows: dict[int, dict[str, Any]] = {}  # by position
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(path)
        if lines:
            self._read(lines, identity)
        self._file = path.open("ab")
        os.truncate(path, sum(map(len, lines)))  # remove a last line torn by a kill
        if not lines:
            self._write({"evaluation": identity})

    def _read(self, lines: Sequence[bytes], identity: dict[str, Any]) -> None:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if number > 1:
                    self.rows[row["position"]] = row
                    continue
                found = row["evaluation"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number}: not a line of an evaluation; remove the file") from error
            wanted = json.loads(json.dumps(identity))
            if found != wanted:
                differs = [key for key in {*found, *wanted} if found.get(key) != wanted.get(key)]
                raise ValueError(
                    f"{self.path} holds an evaluation with another {', '.join(sorted(differs))}: set run.dir to a new "
                    "directory, or remove the file"
                )

    def add(self, answered: Sequence[Answered]) -> None:
        """Append problems. They are on disk when this returns."""
        for item in answered:
            row = row_of(item)
            self.rows[item.position] = row
            self._write(row)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write(self, row: dict[str, Any]) -> None:
        # ensure_ascii: model output may contain lone surrogates and line separators
        self._file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")

    def ordered(self) -> Iterator[dict[str, Any]]:
        """Rows in the order of the set."""
        return (self.rows[position] for position in sorted(self.rows))

    def close(self) -> None:
        self._file.close()


def row_of(item: Answered) -> dict[str, Any]:
    """One problem with its judged completions, as plain JSON."""
    return {
        "position": item.position,
        "id": item.problem.id,
        "problem": item.problem.prompt,
        "gold": item.problem.answer,
        "prompt_tokens": len(item.samples[0].rollout.prompt_ids),
        "samples": [
            {
                "text": sample.text,
                "answer": sample.answer,
                "correct": sample.correct,
                "score": sample.reward,
                "status": sample.status,
                "finish": sample.rollout.finish_reason,
                "tokens": len(sample.rollout.response_ids),
            }
            for sample in item.samples
        ],
    }


def _whole_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [line for line in file if line.endswith(b"\n")]
