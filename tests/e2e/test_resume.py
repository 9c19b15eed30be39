"""Killed, stopped and continued runs end where an uninterrupted replay of their journal ends, bit for bit.

Every start is a process of its own, forked from one that has imported everything (`training.start`). Some kill
themselves at a chosen place; others are killed from outside at a moment drawn from a seeded generator.
"""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from training import arguments, assert_same_run, journal, metrics, start

STEPS = 10
# The learning-rate schedule, the controller and the random token selection all have state that must be restored.
SETTINGS = (
    *(f"train.steps={STEPS}", "train.save_every=2", "eval.every=4", "loss=ce_gppo", "schedule=entropy_target"),
    *("optim.warmup_steps=4", "optim.decay=linear", "selection=clip_cov", "selection.frac=0.1"),
    *("selection.cov_low=-1", "selection.cov_high=5", "train.tis_cap=2"),
)
TIMEOUT_S = 240.0  # of one start, on a busy machine


# --- faults, called in the child before the run ---------------------------------------------------------------------


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def torn_journal(count: int) -> None:
    """Dies half-way through writing the journal's record number ``count`` of this start."""
    from recipes.loop.journal import Journal, frame

    write, seen = Journal._write, [0]

    def torn(self: Journal, payload: bytes) -> None:
        seen[0] += 1
        if seen[0] == count:
            self._file.write((frame(payload) + payload)[: len(payload) // 2])
            self._file.flush()
            _die()
        write(self, payload)

    Journal._write = torn  # type: ignore[method-assign]


def during_save(place: str, count: int) -> None:
    """Dies within save number ``count``: before the manifest, or published but not yet pointed at."""
    from megatron_ext.learner import checkpoint

    name = {"unfinished": "write_manifest", "unpointed": "_write_atomically"}[place]
    original, seen = getattr(checkpoint, name), [0]

    def dies(*args: Any, **kwargs: Any) -> None:
        seen[0] += 1
        if seen[0] == count:
            _die()
        original(*args, **kwargs)

    setattr(checkpoint, name, dies)


def torn_metrics(step: int) -> None:
    """Dies with half of a step's line in metrics.jsonl and in samples.jsonl."""
    from recipes.loop.run_dir import RunDir

    write = RunDir._write_samples

    def torn(self: RunDir, values: Any, *args: Any) -> None:
        write(self, values, *args)
        if values.step == step:
            for name in ("metrics.jsonl", "samples.jsonl"):
                path = self.path / name
                os.truncate(path, path.stat().st_size - 30)
            _die()

    RunDir._write_samples = torn  # type: ignore[method-assign]


def signals_itself(number: signal.Signals, step: int) -> None:
    """Gets a signal right after a step's line is written: while the next step is about to begin."""
    from recipes.loop.run_dir import RunDir

    log = RunDir.log

    def signalled(self: RunDir, values: Any, *args: Any) -> None:
        log(self, values, *args)
        if values.step == step:
            os.kill(os.getpid(), number)

    RunDir.log = signalled  # type: ignore[method-assign]


# --- the tests ------------------------------------------------------------------------------------------------------


def _run(words: list[str], log: Path, fault: Any = None) -> int:
    process = start(words, log, fault)
    process.join(TIMEOUT_S)
    assert process.exitcode is not None, log.read_text()
    return int(process.exitcode)


def _kill_at_random(words: list[str], log: Path, run: Path, rng: random.Random) -> int:
    """SIGKILL up to 0.15 s after a new line of metrics has appeared; the exit code."""
    path = run / "metrics.jsonl"
    before = path.read_text() if path.exists() else ""
    process = start(words, log)
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists() or path.read_text() == before or len(path.read_text()) == 0:
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.15))
    process.kill()
    process.join(10)
    return int(process.exitcode)


def _finish(words: list[str], log: Path) -> None:
    assert _run(words, log) == 0, log.read_text()


def _replay(model: Path, run: Path, to: Path) -> Path:
    _finish(arguments(model, to, *SETTINGS, f"rollout.replay={run}"), to.with_suffix(".log"))
    return to


def test_killed_at_any_moment(model: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "run.log"
    words = arguments(model, run, *SETTINGS, "rollout.max_staleness=2")  # a kill loses the batches in flight
    rng = random.Random(5)
    faults: list[Any] = [
        partial(torn_journal, 2),  # before any checkpoint: the evaluation is complete, the first rollouts are torn
        partial(torn_metrics, 1),
        partial(during_save, "unfinished", 2),  # step 4; step 2 is saved
        None,
        partial(during_save, "unpointed", 2),
        partial(torn_journal, 3),
        None,
    ]
    left = []
    for fault in faults:
        code = _run(words, log, fault) if fault else _kill_at_random(words, log, run, rng)
        assert code == -signal.SIGKILL, log.read_text()
        pointer = run / "checkpoints" / "latest"
        left.append(pointer.read_text().strip() if pointer.is_file() else None)
    assert left[:3] == [None, None, "step_000002"] and left == sorted(left, key=lambda name: name or "")
    _finish(words, log)
    assert log.read_text().count("resuming") == len(faults) - 2, log.read_text()
    assert [row["step"] for row in metrics(run)] == list(range(1, STEPS + 1))
    assert {record["step"] for record in journal(run) if record["kind"] == "rollouts"} == set(range(STEPS))
    assert len(journal(run)) == STEPS + 4, "no record twice"
    assert max(row["rollout/staleness"] for row in metrics(run)) > 0
    assert not list((run / "checkpoints").glob(".*"))
    assert_same_run(run, _replay(model, run, tmp_path / "replay"))

    # An interrupted replay ends complete, and so does the journal that it writes for further replays.
    again = tmp_path / "again"
    words = arguments(model, again, *SETTINGS, f"rollout.replay={run}")
    for fault in (partial(torn_journal, 5), partial(during_save, "unpointed", 3)):
        assert _run(words, tmp_path / "again.log", fault) == -signal.SIGKILL
    _finish(words, tmp_path / "again.log")
    assert_same_run(run, again)
    assert sorted(map(str, journal(again))) == sorted(map(str, journal(run)))


def test_a_signal_ends_the_run_with_a_checkpoint(model: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "run.log"
    words = arguments(model, run, *SETTINGS, "train.save_every=0", "rollout.max_staleness=1")
    for number, after, saved in ((signal.SIGTERM, 1, 2), (signal.SIGUSR1, 4, 5)):
        assert _run(words, log, partial(signals_itself, number, after)) == 0, log.read_text()
        assert (run / "checkpoints" / "latest").read_text() == f"step_{saved:06d}\n"
        assert f"stopped at step {saved} with a checkpoint; the same command continues" in log.read_text()
        assert not (run / "hf").exists(), "the run is not finished"
    _finish(words, log)
    versions = {
        r["step"]: {v for g in r["groups"] for a in g["responses"] for v in a["versions"]} for r in _rollouts(run)
    }
    assert versions == {k: {k if k in (0, 2, 5) else k - 1} for k in range(STEPS)}, "the first after a start is fresh"
    assert_same_run(run, _replay(model, run, tmp_path / "replay"))


def _rollouts(run: Path) -> list[dict[str, Any]]:
    return [record for record in journal(run) if record["kind"] == "rollouts"]


def at_a_call(number: int) -> None:
    """Dies at call ``number`` of those that change the file system, counted from the start of the first save."""
    import shutil

    from megatron_ext.learner.checkpoint import Saver

    save, seen = Saver.save, [0]

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            if seen[0] == number:
                _die()
            return function(*args, **kwargs)

        return call

    def saving(self: Any, *args: Any, **kwargs: Any) -> Any:
        for module, names in ((os, ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")), (shutil, ("rmtree",))):
            for name in names:
                setattr(module, name, counted(getattr(module, name)))
        Saver.save = save  # type: ignore[method-assign]
        return save(self, *args, **kwargs)

    Saver.save = saving  # type: ignore[method-assign]


@pytest.mark.slow
def test_killed_at_twenty_places_of_a_save(model: Path, tmp_path: Path) -> None:
    """Each start continues from the newest checkpoint and dies during the next save, or shortly after it."""
    run, log = tmp_path / "run", tmp_path / "run.log"
    words = arguments(model, run, *SETTINGS, "train.save_every=1", "train.keep_checkpoints=1", "train.steps=24")
    trials = 0
    for number in range(1, 200, 2):
        if (code := _run(words, log, partial(at_a_call, number))) == 0:
            break
        assert code == -signal.SIGKILL, log.read_text()
        trials += 1
    else:
        raise AssertionError("never finished")
    print(f"{trials} kills within saves, all resumed")
    assert trials >= 20 or metrics(run)[-1]["step"] == 24
    assert [row["step"] for row in metrics(run)] == list(range(1, 25))
    replay = tmp_path / "replay"
    _finish(arguments(model, replay, *SETTINGS, "train.steps=24", f"rollout.replay={run}"), tmp_path / "replay.log")
    assert_same_run(run, replay)
