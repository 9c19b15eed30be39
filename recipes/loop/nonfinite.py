"""Handling of a batch whose reward, log-probability, loss or gradient is not finite (``train.nonfinite``).

The check comes before the optimizer step, so the weights do not change. "stop" ends the run and prints the samples'
ids; the job is not requeued, because the journal would give it the same batch again. "skip" continues with the next
batch. Both record the batch in ``quarantine.jsonl`` of the run directory; with "skip" a later start skips it without
computing it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from configs.schema import Config
from megatron_ext.learner import control
from megatron_ext.learner.learner import NotFinite
from megatron_ext.rl.types import Sample, TokenStats

FILE = "quarantine.jsonl"
WHOLE = -1  # instead of the number of an update: the whole batch of a step
SHOWN = 8  # samples in a message; the file has all of them
T = TypeVar("T")


class Guard:
    """Makes the same decision on every rank; rank 0 writes the file."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._skip, self._most = config.train.nonfinite == "skip", config.train.nonfinite_in_a_row
        self._file = run_dir / FILE
        self._first = torch.distributed.get_rank() == 0
        text = self._file.read_bytes() if self._first and self._file.is_file() else b""
        lines = control.broadcast_bytes(text, src=0).decode().splitlines()
        self._known = {(row["step"], row["update"]) for row in map(json.loads, filter(_whole, lines))}
        self._in_a_row = self._update = 0
        self.skipped = 0  # updates of the current step; a whole batch counts as one

    def accepts(
        self, step: int, samples: Sequence[Sample], rollout_logp: torch.Tensor, stats: TokenStats | None
    ) -> bool:
        """Whether the batch of a step (counted from 0) is trained on. See :class:`NotFinite` for what is raised."""
        self._update = self.skipped = 0
        lengths = [len(sample.rollout.response_ids) for sample in samples]
        checks = [
            ("reward", [math.isfinite(sample.reward) for sample in samples]),
            ("log-probability of the rollout", _finite(rollout_logp, lengths)),
        ]
        if stats is not None:
            checks.append(("log-probability of the learner", _finite(stats.logp + stats.entropy, lengths)))
        for what, values in checks:
            if bad := [sample for sample, good in zip(samples, values, strict=True) if not good]:
                self._set_aside(step, WHOLE, what, bad)
                return False
        return True

    def update(self, step: int, samples: Iterable[Sample], call: Callable[[], T]) -> T | None:
        """The result of one optimizer step on ``samples``, or None if it was skipped."""
        number, self._update = self._update, self._update + 1
        if self._skip and (step, number) in self._known:
            self.skipped += 1
            return None
        try:
            result = call()
        except NotFinite as error:
            self._set_aside(step, number, str(error), list(samples))
            return None
        self._in_a_row = 0
        return result

    def _set_aside(self, step: int, update: int, what: str, samples: Sequence[Sample]) -> None:
        """Record the batch. Raises NotFinite unless the run may continue."""
        ids = [f"{sample.problem_id}#{sample.seq_id}" for sample in samples]
        if self._first and (step, update) not in self._known:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "update": update, "what": what, "samples": ids}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._known.add((step, update))
        self._in_a_row, self.skipped = self._in_a_row + 1, self.skipped + 1
        where = f"step {step + 1}" + (f", update {update + 1}" if update != WHOLE else "")
        shown = ", ".join(ids[:SHOWN]) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")
        if not self._skip:
            raise NotFinite(
                f"{where}: not finite: {what}; samples {shown}. The weights are those before it. Look at them in the "
                "journal; train.nonfinite=skip continues without this batch"
            )
        if self._in_a_row >= self._most:
            raise NotFinite(
                f"{where}: not finite: {what}; samples {shown}. {self._in_a_row} batches in a row "
                f"(train.nonfinite_in_a_row={self._most}): single samples are not the cause; resume from an "
                "earlier checkpoint with a lower optim.lr, or look for the cause in quarantine.jsonl"
            )
        if self._first:
            print(f"{where}: skipped, not finite: {what}; samples {shown}", flush=True)


def _finite(values_T: torch.Tensor, lengths: Sequence[int]) -> list[bool]:
    """For every sample whether all of its tokens' values are finite."""
    return [bool(part.all()) for part in torch.isfinite(values_T).split(list(lengths))]


def _whole(line: str) -> bool:
    return line.startswith("{") and line.endswith("}")  # else torn by a kill
