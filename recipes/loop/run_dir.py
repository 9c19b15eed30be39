"""Files and progress output of a run. Rank 0 writes; on the other ranks the same calls do nothing."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from configs.load import load_saved_config, save_config
from configs.schema import Config
from conversion.publish import require_replaceable
from megatron_ext import progress
from megatron_ext.rl.types import Sample
from recipes.checks.resume import Changes, check_changes, check_replay, differences, shown
from recipes.cluster import flight, heartbeat, lock
from recipes.cluster.attempt import (
    FINISHED,
    LATEST,
    LOGS,
    STOP,
    VARIABLE,
    checkpoint_step,
    make_run_dir,
    own_attempt,
    write_finished,
)
from recipes.cluster.attempt import record as record_event
from recipes.loop import journal
from recipes.loop import samples as kept_samples
from recipes.loop.display import Display
from recipes.loop.metrics import StepMetrics
from recipes.loop.trackers import Sink
from recipes.loop.watch import Watch
from recipes.models.card import export_card, save_command

if TYPE_CHECKING:  # importing Megatron takes seconds
    from megatron_ext.learner.learner import Learner

HANG_S, CPU_HANG_S = 60.0, 600.0  # without ``run.hang_s``; a CPU may compute on one micro-batch for minutes
ROLE = "learner"  # rank 0 speaks for the learner; under Slurm each rank's errors and exit status are recorded besides


class RunDir:
    """Context manager around a run directory: lock, metrics, samples, report, live progress, the attempt's events."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = Path(config.run.dir)
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / LOGS / LATEST  # of this attempt, once entered
        self._first = torch.distributed.get_rank() == 0
        self._world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self._role = f"{ROLE}-rank{torch.distributed.get_rank()}"
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None
        self._tokenizer: Any = None
        self._val: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self._begin = time.monotonic()
        self._display = Display()
        self._sink = Sink(config, self.path, self.say)
        self.watch = Watch(config)
        self._heartbeat: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RunDir:
        if not self._first:
            if self._world > 1:
                self._start_heartbeat(self._shared_attempt())
            return self
        replay = self.config.rollout.replay
        if replay is not None and Path(replay).resolve() == self.path.resolve():
            raise ValueError(f"rollout.replay={replay} is this run's own directory; set run.dir to another one")
        make_run_dir(self.path, self.config.run.group)
        self.checkpoints.mkdir(exist_ok=True)
        self._lock = lock.take(self.path)
        try:
            self._enter()
        except BaseException:
            self._lock.close()  # refused: release the directory immediately
            raise
        self._shared_attempt()
        return self

    def _shared_attempt(self) -> Path:
        """The attempt's directory on every rank: the batch script has named it, or else rank 0 does. A collective."""
        if VARIABLE in os.environ:
            return Path(os.environ[VARIABLE])
        if self._world == 1:
            return self.logs
        from megatron_ext.learner import control

        return Path(control.broadcast_bytes(str(self.logs.absolute()).encode(), src=0).decode())

    def _enter(self) -> None:
        """Check what is there, make the attempt's logs and begin its heartbeat; the lock is held."""
        assert self._lock is not None
        saved = self.path / "config.yaml"
        changes: Changes = {}
        if saved.is_file():
            rollouts = self.path / journal.FILE
            begun = (rollouts.is_file() and rollouts.stat().st_size > 0) or any(self.checkpoints.iterdir())
            changes = check_changes(differences(load_saved_config(saved), self.config), self.config, begun=begun)
        check_replay(self.config)
        save_command(self.path)
        self.logs = own_attempt(self.path)
        save_config(self.config, saved)
        save_config(self.config, self.logs / "config.yaml")
        if changes:
            record_event(self.logs, ROLE, "changed", changes=changes)
            self.say(f"changed since the last start: {shown(changes)}")
        lock.told(self._lock, self.logs)
        self._start_heartbeat(self.logs)

    def _start_heartbeat(self, attempt: Path) -> None:
        rollout, run = self.config.rollout, self.config.run
        # A live server answers within `timeout_s`; without one, a server must return within `revive_timeout_s`.
        hang_s = run.hang_s or (HANG_S if torch.cuda.is_available() else CPU_HANG_S)
        limits = {"rollout": rollout.timeout_s + rollout.revive_timeout_s + hang_s}
        record, rank = progress.open_record(), torch.distributed.get_rank()
        self._heartbeat = heartbeat.start(
            attempt,
            rank,
            record,
            hang_s,
            limits | run.hang_phases_s,
            flight=(flight_fd := flight.listen(attempt / flight.DIRECTORY, rank)),
            guarded_ranks=self._world if self._first and VARIABLE not in os.environ else 0,
        )
        os.close(record)
        os.close(flight_fd)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self._heartbeat is not None and error is None:
            progress.at("end")
            heartbeat.stop(self._heartbeat)
        if isinstance(error, KeyboardInterrupt):
            if self._first:
                record_event(self.logs, ROLE, "stopped", step=checkpoint_step(self.path), interrupted=True)
        elif error is not None and (self._first or VARIABLE in os.environ):
            first_line = (str(error).splitlines() or [""])[0]
            where, role = (self.logs, ROLE) if self._first else (Path(os.environ[VARIABLE]), self._role)
            record_event(where, role, "failed", error=f"{type(error).__name__}: {first_line}")
        self._sink.close()
        self._display.stop()
        if self._metrics is not None:
            self._metrics.close()
        if self._lock is not None:
            lock.release(self._lock)

    def begin(self, step: int, vocab_size: int | None = None) -> None:
        """Truncate the logs to ``step``, from which the run continues.

        Args:
            vocab_size: of the model, for the warning of entropy near ln V.

        Raises:
            ValueError: the run is beyond ``train.steps``, or its export would replace files that it did not write.
        """
        self.watch = Watch(self.config, vocab_size)
        if not self._first:
            return
        if step > self.config.train.steps:
            raise ValueError(
                f"train.steps={self.config.train.steps} is below the {step} steps that run.dir={self.path} has done; "
                f"set train.steps={step} or more, or run.dir to a new directory"
            )
        for name in ("hf", "best"):  # found at the export, it would cost the run
            if (self.path / name).exists():
                require_replaceable(self.path / name, overwrite=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            _keep_steps(self.path / name, step)
        self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        record_event(self.logs, ROLE, "started", step=step, steps=self.config.train.steps)
        if step < self.config.train.steps:
            (self.path / FINISHED).unlink(missing_ok=True)
        if step:
            self.say(f"resuming {self.path} after step {step}")
        self._sink.begin()
        self._display.start(step, self.config.train.steps)

    def say(self, text: str) -> None:
        if self._first:
            self._display.say(text)

    def evaluated(self, metrics: Mapping[str, float], *, before: bool = False) -> None:
        """Record an evaluation, for the line of the next step (before training) or of the step just finished."""
        if not metrics or not self._first:
            return
        (self._before if before else self._val).update(metrics)
        hidden = ("/low", "/high", "/problems", "/truncated")
        shown = "  ".join(f"{k} {v:.3f}" for k, v in metrics.items() if not k.endswith(hidden))
        self.say(f"{'before training' if before else 'evaluation'}: {shown}")

    def log(self, metrics: StepMetrics, samples: list[Sample], record: Mapping[str, Any]) -> None:
        """Write the step's line and completions; update the progress and, every `run.report_every` steps, the
        report."""
        progress.at("report")
        if not self._first:
            return
        values = metrics.result(record.get("timing", {}))
        values |= {f"val-before/{k}": v for k, v in self._before.items()}
        values |= {f"val-core/{k}": v for k, v in self._val.items()}
        self._before, self._val = {}, {}
        assert self._metrics is not None
        self._metrics.write(json.dumps(values) + "\n")
        self._metrics.flush()
        self._sink.log(values)
        self._write_samples(metrics, samples, record)
        self._display.step(metrics.step, values)
        self._warn(self.watch.observe(values), metrics.step)
        every = self.config.run.report_every
        if every and metrics.step % every == 0:
            self._report()

    def _warn(self, warnings: Sequence[str], step: int) -> None:
        for warning in warnings:
            self.say(warning)
            record_event(self.logs, ROLE, "warning", step=step, text=warning)

    @property
    def stop_file(self) -> Path:
        """If this file exists, the run saves a checkpoint at the next step boundary and ends."""
        return self.logs / STOP

    def stopped(self, step: int) -> None:
        """Report the end of the run after ``step``, with a checkpoint: on request, or without a learning signal.

        Raises:
            ValueError: the run stopped itself.
        """
        if not self._first:
            return
        if why := self.watch.stalled:
            raise ValueError(f"stopped at step {step}: {why} (train.stop_after_silent_steps)")
        record_event(self.logs, ROLE, "stopped", step=step)
        self.say(f"stopped at step {step} with a checkpoint; the same command continues")

    def finish(self, learner: Learner, model_dir: Path) -> None:
        """Export the policy as a Hugging Face directory and write the report.

        Raises:
            ValueError: a weight is not finite; nothing is exported then.
        """
        progress.at("finish")
        out = self.path / "hf"
        self._export(learner, model_dir, out, self.config.train.steps)
        if self._first:
            self._display.stop()
            self._warn(self.watch.at_end(), self.config.train.steps)
            report = self._report()
            write_finished(self.path, self.config.train.steps)
            record_event(self.logs, ROLE, "finished", step=self.config.train.steps)
            minutes = (time.monotonic() - self._begin) / 60
            self.say(f"done in {minutes:.1f} min: report {report}, model {out}, metrics {self.path / 'metrics.jsonl'}")

    def keep_best(
        self,
        learner: Learner,
        model_dir: Path,
        values: Mapping[str, float],
        step: int,
        best: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Export the policy to ``best/`` if ``eval.best`` has improved; returns the new entries of the run's state.

        A collective: every rank has the same ``values`` of the evaluation after ``step``, and the same ``best`` so far.
        """
        metric = self.config.eval.best
        if metric is None or metric not in values or (best is not None and values[metric] <= best["value"]):
            return {}
        found = {"metric": metric, "value": values[metric], "step": step}
        self._export(learner, model_dir, self.path / "best", step)
        if self._first:
            (self.path / "best.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
            self.say(f"best {metric} so far: {values[metric]:.3f} after step {step}, kept in {self.path / 'best'}")
        return {"best": found}

    # --- inside ---------------------------------------------------------------------------------------------------

    def _export(self, learner: Learner, model_dir: Path, out: Path, step: int) -> None:
        """Write the policy as a Hugging Face directory. A collective. ValueError when a weight is not finite."""
        from conversion.megatron_to_hf import write_hf
        from megatron_ext.learner import control
        from megatron_ext.learner.model import DTYPES
        from megatron_ext.learner.weights import nonfinite_parameters

        if bad := nonfinite_parameters(learner.chunks):
            raise ValueError(
                f"{bad} weights of the policy are not finite after step {step}, so it is not "
                f"exported: lower optim.lr or optim.clip_grad, and go back to an earlier checkpoint of {self.path}"
            )
        tensors = learner.export()
        if self._first:
            card = export_card(self.config, step, self.path)
            dtype = DTYPES[self.config.model.dtype]
            write_hf(out, learner.hf, model_dir, tensors, dtype, overwrite=True, card=card)
        for _ in tensors:
            pass
        control.barrier()  # rank 0 may still write

    def _report(self) -> Path:
        from recipes.reporting.page import write_report

        return write_report(self.path)

    def _write_samples(self, metrics: StepMetrics, samples: list[Sample], record: Mapping[str, Any]) -> None:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            from recipes.models.locate import model_location

            self._tokenizer = AutoTokenizer.from_pretrained(model_location(self.config))
        golds = dict(zip(record["problems"], record["golds"], strict=True))
        with (self.path / "samples.jsonl").open("a", encoding="utf-8") as file:
            for sample, row in kept_samples.rows(samples, metrics.token_statistics, metrics.trace, self._tokenizer):
                row = {"step": metrics.step, **row, "gold": golds[sample.problem_id]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _keep_steps(path: Path, last: int) -> None:
    """Drop the lines of steps after ``last``, and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= last:
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
