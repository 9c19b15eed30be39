"""The rollouts of a run on every rank: read from the journal if they are there, else collected live by rank 0."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from configs.schema import Config
from megatron_ext import progress
from megatron_ext.learner import control
from megatron_ext.learner.critic import Critic
from megatron_ext.learner.learner import Learner
from megatron_ext.rl.types import Sample
from recipes.loop import journal
from recipes.loop.batch import split
from recipes.loop.collect import Collector
from recipes.loop.deal import deal
from recipes.loop.metrics import StepMetrics
from recipes.loop.spread import Spread, everyone_sees
from recipes.rollout.colocated import Sleeper, Turns
from recipes.rollout.engine import cast_floats


class RolloutStream:
    """Context manager. Rank 0 starts the engine when the first live rollouts are needed, so never in a replay."""

    def __init__(
        self, config: Config, model_dir: Path, run_dir: Path, learner: Learner, critic: Critic | None = None
    ) -> None:
        self._config, self._model_dir, self._run_dir, self._learner = config, model_dir, run_dir, learner
        self._first = torch.distributed.get_rank() == 0
        self._replay = config.rollout.replay is not None
        self._collector: Collector | None = None
        self._journal: journal.Journal | None = None
        self._served = -1  # weight version that the engine serves
        self._spread: Spread | bool | None = None  # None: not known yet; False: all weights go through rank 0
        self._turns: Turns | None = None
        if config.rollout.colocated:
            models = [model for model in (learner, critic) if model is not None]
            self._turns = Turns(models, self._sleeper if self._first else None)

    def __enter__(self) -> RolloutStream:
        if self._first:
            source = journal.source_file(Path(self._config.rollout.replay)) if self._config.rollout.replay else None
            self._journal = journal.Journal(self._run_dir / journal.FILE, source)
        return self

    def __exit__(self, *_: object) -> None:
        if self._collector is not None:
            self._collector.close()
        if self._journal is not None:
            self._journal.close()

    def next(self, step: int, position: int, metrics: StepMetrics) -> tuple[dict[str, Any], list[Sample]]:
        """The record and samples of a step. Before live rollouts the engine gets the learner's current weights.

        With ``rollout.max_staleness`` k, collection for the next k steps starts here and runs beside the training. A
        batch starts with the weights of k steps before its own, so its tokens are never older. With ``rollout.partial``
        no batch is begun ahead: `recipes.loop.partial` keeps more groups open than a batch holds.
        """
        progress.at("rollout", step=step)
        rollout = self._config.rollout
        ahead = 0 if rollout.partial else rollout.max_staleness
        record: bytes = b""
        if self._available("rollouts", step):
            if self._first:
                assert self._journal is not None
                record = self._journal.copy("rollouts", step)
        else:
            with metrics.clock("wait"):
                found = self._live().finish(step) if self._first and self._turns is None else None
            with contextlib.ExitStack() as served:
                with metrics.clock("sync"):
                    served.enter_context(self._serving(step))
                progress.at("rollout", step=step)
                if self._first:
                    if found is None:
                        with metrics.clock("wait"):
                            self._live().begin(step, position, 1 + ahead, self._carried(step))
                            found = self._live().finish(step)
                    metrics.add({f"timing_s/sync/{name}": s for name, s in self._live().engine.sync_seconds.items()})
                    assert found is not None and self._journal is not None
                    record = self._journal.put(found)
                    check_staleness(journal.Record(record), rollout.max_staleness)
                    self._live().begin(step + 1, found["position"], ahead)
        begin = time.monotonic()
        decoded, tokens = deal(record, self._shares, self._learner.replica)
        metrics.add({"timing_s/deal": time.monotonic() - begin})  # on rank 0, the one that nobody keeps waiting
        metrics.add({f"rollout/{name}": float(value) for name, value in decoded.about.get("counters", {}).items()})
        metrics.add({f"critic/rewards/{name}": mean for name, mean in decoded.about.get("reward_terms", {}).items()})
        first_seq_id = step * self._config.rollout.prompts_per_step * self._config.rollout.n
        return decoded.about, decoded.samples(first_seq_id, tokens)

    def _shares(self, lengths: list[int], groups: list[int]) -> list[list[int]]:
        """Samples by data-parallel rank: those of the statistics pass, which takes all, and of the updates."""
        mini_batches = split(torch.tensor(groups), self._config.train.mini_batch_prompts)
        return self._learner.shares(lengths, [range(len(lengths)), *mini_batches])

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluation of the weights after ``step`` steps; empty in a replay whose journal has none."""
        progress.at("rollout", "evaluation", step=step)
        line = b""
        if self._available("eval", step):
            if self._first:
                assert self._journal is not None
                line = self._journal.copy("eval", step)
        elif not self._replay:
            with self._serving(step):  # requests in flight for later steps continue under these weights
                if self._first:
                    assert self._journal is not None
                    line = self._journal.put(self._live().evaluate(step))
        line = control.broadcast_bytes(line, src=0)
        return dict(journal.Record(line).about.get("metrics", {})) if line else {}

    def agree(self, flag: bool) -> bool:
        """Rank 0's flag on every rank."""
        return control.agree(flag)

    def _carried(self, step: int) -> list[int]:
        """Problems that partial rollouts had begun when a run was stopped after this many steps: begun anew."""
        if not self._config.rollout.partial or self._journal is None or not self._journal.has("rollouts", step - 1):
            return []
        return list(self._journal.about("rollouts", step - 1).get("open", []))

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

    def _sleeper(self) -> Sleeper:
        return cast(Sleeper, self._live().engine)  # configs.load refuses other engines in colocated mode

    @contextlib.contextmanager
    def _serving(self, version: int) -> Iterator[None]:
        """Inside, the engine serves the learner's current weights as ``version``. A collective."""
        if self._turns is None:
            self._push(version)
            yield
        else:
            with self._turns.rollout(lambda: self._send(version)):
                yield

    def _push(self, version: int) -> None:
        """Send the learner's weights to the engine as ``version``, unless it has them. A collective."""
        if self._served < 0 and version == 0 and not self._config.rollout.urls:
            self._served = 0  # the engine starts from the directory that the learner was loaded from
            if self._first:
                self._live()
        if self._served != version:
            self._send(version)

    def _send(self, version: int) -> None:
        if self._spread is None and torch.distributed.get_world_size() > 1:
            all_see = everyone_sees(self._live().engine.staging_root if self._first else None)
            self._spread = Spread() if all_see else False
        spread = self._spread if isinstance(self._spread, Spread) else None
        tensors = self._learner.export(explicit_lm_head=True, spread=spread is not None)
        if self._turns is not None:
            # The sender hashes tensors through numpy, which prevents torch from freeing a CPU weight's storage later.
            tensors = ((name, tensor.clone()) for name, tensor in tensors)
        if spread is not None:  # the others wait until they are told where to write
            if self._first:
                self._live().engine.push(version, tensors, spread)
            else:
                spread.write(cast_floats(tensors, self._config.rollout.dtype))
        elif self._first:
            self._live().engine.push(version, _after_barrier(tensors))
        else:
            control.barrier()
        for _ in tensors:  # other ranks take part in every gather
            pass
        self._served = version


def _after_barrier(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors; the other ranks enter the first gather only once the engine asks for the first tensor.

    Before that it may start servers, or wait for one that is coming back.
    """
    control.barrier()
    yield from tensors


def check_staleness(record: journal.Record, most: int) -> None:
    """RuntimeError when a token was written by weights more than ``most`` steps older than the step it trains."""
    oldest, step = record.oldest_version(), record.about["step"]
    if oldest is not None and oldest < step - most:
        raise RuntimeError(
            f"rollouts of step {step + 1} hold tokens of weight version {oldest}, older than "
            f"rollout.max_staleness={most} allows: this is a defect, please report it"
        )
