"""The rollouts of a run as every rank sees them: from the journal if they are there, else collected live by rank 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from configs.schema import Config
from megatron_ext.learner.learner import Learner, broadcast_bytes
from megatron_ext.rl.types import Sample
from recipes import journal
from recipes.collect import Collector
from recipes.metrics import StepMetrics


class RolloutStream:
    """Context manager. Rank 0 starts the engine when the first live rollouts are needed: a replay never does."""

    def __init__(self, config: Config, model_dir: Path, run_dir: Path, learner: Learner) -> None:
        self._config, self._model_dir, self._run_dir, self._learner = config, model_dir, run_dir, learner
        self._first = torch.distributed.get_rank() == 0
        self._replay = config.rollout.replay is not None
        self._collector: Collector | None = None
        self._journal: journal.Journal | None = None
        self._served = -1  # weight version that the engine serves

    def __enter__(self) -> RolloutStream:
        if self._first:
            source = Path(self._config.rollout.replay) / journal.FILE if self._config.rollout.replay else None
            self._journal = journal.Journal(self._run_dir / journal.FILE, source)
        return self

    def __exit__(self, *_: object) -> None:
        if self._collector is not None:
            self._collector.close()
        if self._journal is not None:
            self._journal.close()

    def next(self, step: int, position: int, metrics: StepMetrics) -> tuple[dict[str, Any], list[Sample]]:
        """The record and samples of a step; before live ones the engine gets the learner's present weights.

        With ``rollout.max_staleness`` 1 the following step's collection begins here, to run beside the training.
        """
        record: bytes = b""
        if self._available("rollouts", step):
            if self._first:
                assert self._journal is not None
                record = self._journal.copy("rollouts", step)
        else:
            with metrics.clock("wait"):
                found = self._live().finish() if self._first else None
            with metrics.clock("sync"):
                self._push(step)
            if self._first:
                with metrics.clock("wait"):
                    if found is None:
                        self._live().start(step, position)
                        found = self._live().finish()
                assert found is not None and self._journal is not None
                record = self._journal.put(found)
                if self._config.rollout.max_staleness and step + 1 < self._config.train.steps:
                    self._live().start(step + 1, found["position"])
        decoded: dict[str, Any] = json.loads(broadcast_bytes(record, src=0, device=self._learner.device))
        first_seq_id = step * self._config.rollout.prompts_per_step * self._config.rollout.n
        return decoded, journal.decode_samples(decoded, first_seq_id)

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluation of the weights after ``step`` steps; empty in a replay whose journal has none."""
        line = b"{}"
        if self._available("eval", step):
            if self._first:
                assert self._journal is not None
                line = self._journal.copy("eval", step)
        elif not self._replay:
            waiting = self._live().finish() if self._first else None
            self._push(step)
            if self._first:
                assert self._journal is not None
                line = self._journal.put(self._live().evaluate(step))
                if waiting is not None:  # rollouts begun ahead of time are kept for the next step
                    self._live().put_back(waiting)
        decoded = json.loads(broadcast_bytes(line, src=0, device=self._learner.device))
        return dict(decoded.get("metrics", {}))

    def agree(self, flag: bool) -> bool:
        """Rank 0's flag on every rank."""
        return broadcast_bytes(bytes([flag]), src=0, device=self._learner.device) == b"\x01"

    # --- inside ---------------------------------------------------------------------------------------------------

    def _available(self, kind: str, step: int) -> bool:
        mine = self._journal is not None and self._journal.has(kind, step)
        available = self.agree(mine)
        if not available and self._replay and kind == "rollouts":
            raise ValueError(
                f"rollout.replay={self._config.rollout.replay}: its journal ends before step {step + 1}; "
                f"set train.steps={step} or replay a longer run"
            )
        return available

    def _live(self) -> Collector:
        if self._collector is None:
            self._collector = Collector(self._config, self._model_dir, self._run_dir)
        return self._collector

    def _push(self, version: int) -> None:
        """Give the engine the learner's weights as ``version``. A collective. Weights it has already are not sent."""
        if self._served < 0 and version == 0:
            self._served = 0  # the engine starts from the directory that the learner was loaded from
            if self._first:
                self._live()
        if self._served == version:
            return
        tensors = self._learner.export(explicit_lm_head=True)
        if self._first:
            self._live().engine.push(version, tensors)
        for _ in tensors:  # other ranks take part in every gather
            pass
        self._served = version
