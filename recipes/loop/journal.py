"""The rollout journal: one JSON line per batch of rollouts or evaluation, synced to disk before anything is trained.

It is the only source of randomness that a run has, so it makes a run repeatable: training on a journal gives the same
numbers bit for bit, and a run that was killed continues with the rollouts it had already made.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_ext.rl.types import Problem, Rollout, Sample

FILE = "journal.jsonl"


class Journal:
    """Records by (kind, step), kind being "rollouts" or "eval". ``source`` is read, ``target`` appended to."""

    def __init__(self, target: Path, source: Path | None = None) -> None:
        """Read ``source`` (default: ``target``) if it exists; a torn last line of ``target``, left by a kill, is cut.

        Raises ValueError when another line is broken: a journal that lost its middle cannot be trusted.
        """
        self._target = target
        self._own = _read(target)
        self._lines = self._own if source is None or source == target else _read(source)
        if target.exists():
            os.truncate(target, sum(map(len, _whole_lines(target))))
        self._file = target.open("ab")

    def has(self, kind: str, step: int) -> bool:
        return (kind, step) in self._lines

    def put(self, record: dict[str, Any]) -> bytes:
        """Append a record, durable when this returns."""
        line = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        self._write(line)
        return line

    def copy(self, kind: str, step: int) -> bytes:
        """A record of the source, which the target then holds too, byte for byte.

        Raises ValueError when the target has another record for this step.
        """
        line = self._lines[kind, step]
        if (kind, step) not in self._own:
            self._write(line)
        elif self._own[kind, step] != line:
            raise ValueError(
                f"{self._target} holds other rollouts of step {step + 1} than the journal that is replayed; "
                "set run.dir to a new directory"
            )
        return line

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _read(path: Path) -> dict[tuple[str, int], bytes]:
    records: dict[tuple[str, int], bytes] = {}
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            record = json.loads(line)
            records[record["kind"], record["step"]] = line
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a journal record; restore the file") from error
    return records


def _whole_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [line for line in file if line.endswith(b"\n")]


def encode_group(problem: Problem, samples: list[Sample]) -> dict[str, Any]:
    """One prompt with its responses, small and exact (floats are written so that they read back equal)."""
    return {
        "problem": problem.id,
        "gold": problem.answer,
        "prompt": samples[0].rollout.prompt_ids,
        "responses": [
            {
                "ids": s.rollout.response_ids,
                "logprobs": s.rollout.logprobs,
                "versions": s.rollout.weight_versions,
                "finish": s.rollout.finish_reason,
                "reward": s.reward,
                "correct": s.correct,
                "status": s.status,
            }
            for s in samples
        ],
    }


def decode_samples(record: dict[str, Any], first_seq_id: int) -> list[Sample]:
    """The samples of a "rollouts" record, numbered from ``first_seq_id``."""
    samples: list[Sample] = []
    for group, entry in enumerate(record["groups"]):
        for r in entry["responses"]:
            rollout = Rollout(entry["prompt"], r["ids"], r["logprobs"], r["versions"], r["finish"])
            samples.append(
                Sample(
                    rollout,
                    problem_id=entry["problem"],
                    group=group,
                    seq_id=first_seq_id + len(samples),
                    reward=r["reward"],
                    correct=r["correct"],
                    status=r["status"],
                )
            )
    return samples
