"""The run directory: lock, truncation of logs on resume, refusal of another run's settings."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.schema import Config
from megatron_ext.rl.types import Rollout, Sample
from recipes import status
from recipes.checks.settings import load_checked
from recipes.loop.metrics import StepMetrics
from recipes.loop.run_dir import RunDir
from recipes.loop.stop import StopSignal
from recipes.models.prepare import make_tiny_model
from recipes.reporting.page import write_report


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=0)


@pytest.fixture(autouse=True)
def rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)


def config(model: Path, run: Path, *extra: str) -> Config:
    return load_checked([f"model.path={model}", f"run.dir={run}", "run.report_every=0", "train.steps=9", *extra])


def log(run: RunDir, step: int) -> None:
    samples = [Sample(Rollout([1, 4], [5, 2], [-1.0, -1.0], [0, 0], "stop"), "p", 0, i) for i in range(8)]
    metrics = StepMetrics(step)
    metrics.rollouts(samples)
    run.log(metrics, samples, {"problems": ["p"], "golds": ["7"]})


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_a_step_writes(model: Path, tmp_path: Path) -> None:
    with RunDir(config(model, tmp_path / "run")) as run:
        run.begin(0)
        run.evaluated({"chain/avg@2": 0.25}, before=True)
        run.evaluated({"chain/avg@2": 0.5})
        log(run, 1)
        log(run, 2)
        assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2], "flushed at once"
    first, second = rows(tmp_path / "run" / "metrics.jsonl")
    assert first["val-before/chain/avg@2"] == 0.25 and first["val-core/chain/avg@2"] == 0.5
    assert not [name for name in second if name.startswith("val-")]
    samples = rows(tmp_path / "run" / "samples.jsonl")
    assert [row["step"] for row in samples] == [1] * 4 + [2] * 4
    assert samples[0]["gold"] == "7" and samples[0]["response"].endswith("<eos>")


def test_an_export_that_would_replace_foreign_files_is_refused_at_the_start(model: Path, tmp_path: Path) -> None:
    notes = tmp_path / "hf" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(ValueError, match=r"hf is not replaced: .*notes.txt.*move it away"):
        with RunDir(config(model, tmp_path)) as run:
            run.begin(0)
    assert notes.read_text() == "mine"


def test_entropy_near_that_of_guessing_is_warned_of(model: Path, tmp_path: Path) -> None:
    with RunDir(config(model, tmp_path)) as run:
        run.begin(0, vocab_size=8)
        found = [text for _ in range(5) for text in run.watch.observe({"actor/entropy": 2.079})]
    assert any("ln V" in text for text in found)


@pytest.mark.parametrize("torn", ["", '{"step": 5, "critic/rew'])
def test_logs_are_cut_back_to_the_checkpoint(model: Path, tmp_path: Path, torn: str) -> None:
    with RunDir(config(model, tmp_path)) as run:
        run.begin(0)
        for step in (1, 2, 3, 4):
            log(run, step)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write(torn)
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:2]
    with RunDir(config(model, tmp_path)) as run:
        run.begin(2)
        log(run, 3)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:2] == kept
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [1] * 4 + [2] * 4 + [3] * 4


def test_two_processes_cannot_share_a_directory(model: Path, tmp_path: Path) -> None:
    with RunDir(config(model, tmp_path)):
        with pytest.raises(ValueError, match=f"run.dir={tmp_path} is in use by process .*; wait or choose another"):
            RunDir(config(model, tmp_path)).__enter__()
    with RunDir(config(model, tmp_path)):
        pass  # free again


@pytest.mark.parametrize(
    "change", ["seed=1", "rollout.n=4", "rollout.prompts_per_step=16", "train.mini_batch_prompts=4", "train.epochs=2"]
)
def test_a_directory_belongs_to_one_run(model: Path, tmp_path: Path, change: str) -> None:
    with RunDir(config(model, tmp_path)):
        pass
    saved = (tmp_path / "config.yaml").read_text()
    key = change.split("=")[0]
    with pytest.raises(ValueError, match=f"holds a run with {key}=.*; set run.dir to a new directory"):
        RunDir(config(model, tmp_path, change)).__enter__()
    assert (tmp_path / "config.yaml").read_text() == saved
    with RunDir(config(model, tmp_path, "train.steps=20")):
        pass  # a longer run is the same run


def test_changes_need_consent_and_are_shown(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDir(config(model, tmp_path)) as run:
        run.begin(0)
        log(run, 1)
        (tmp_path / "checkpoints" / "step_000001").mkdir()
    words = ("optim.lr=1e-5", "train.steps=20")
    with pytest.raises(ValueError, match=r"optim.lr=5e-05 \(now 1e-05\): .* resume.allow_changes=true"):
        RunDir(config(model, tmp_path, *words)).__enter__()
    assert not (tmp_path / "logs" / "attempt_2").exists() and "lr: 5.0e-05" in (tmp_path / "config.yaml").read_text()
    with RunDir(config(model, tmp_path, *words, "resume.allow_changes=true")) as run:
        run.begin(1)
        log(run, 2)
    assert "lr: 5.0e-05" in (tmp_path / "logs" / "attempt_1" / "config.yaml").read_text()
    assert "lr: 1.0e-05" in (tmp_path / "logs" / "attempt_2" / "config.yaml").read_text()
    capsys.readouterr()
    assert status.main([str(tmp_path)]) == 0
    line = "attempt 2, after step 1: train.steps 9 → 20, optim.lr 5e-05 → 1e-05"
    assert line in capsys.readouterr().out
    assert f"Settings changed in {line}" in write_report(tmp_path).read_text()


def test_fewer_steps_than_were_done(model: Path, tmp_path: Path) -> None:
    with RunDir(config(model, tmp_path)) as run:
        with pytest.raises(ValueError, match=r"train.steps=9 is below the 12 steps that run.dir=.* has done; set"):
            run.begin(12)


def test_a_run_is_not_replayed_into_itself(model: Path, tmp_path: Path) -> None:
    (tmp_path / "journal.bin").touch()
    with pytest.raises(ValueError, match="is this run's own directory; set run.dir to another one"):
        RunDir(config(model, tmp_path, f"rollout.replay={tmp_path}/../{tmp_path.name}")).__enter__()


def test_other_ranks_write_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with RunDir(config(model, tmp_path / "run")) as run:
        run.begin(0)
        run.say("hello")
        run.evaluated({"x": 1.0})
        log(run, 1)
    assert not (tmp_path / "run").exists()


def test_a_run_that_stops_itself_is_not_done(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal rewards in every step (produced by `log`): a warning, then a stop, which `status` reports."""
    with pytest.raises(
        ValueError, match=r"stopped at step 4: no learning signal in 4 steps in a row: all rewards are 0"
    ):
        with RunDir(config(model, tmp_path, "train.stop_after_silent_steps=4")) as run:
            run.begin(0)
            for step in (1, 2, 3, 4):
                assert not run.watch.stalled
                log(run, step)
            assert run.watch.stalled
            run.stopped(4)
    assert "warning: no learning signal in the last 3 steps: all rewards are 0" in capsys.readouterr().out
    assert status.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "failed" in out and "no learning signal" in out


def test_a_requested_stop_is_shown_with_its_step(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunDir(config(model, tmp_path)) as run:
        run.begin(0)
        log(run, 1)
        run.stopped(1)
    assert "stopped at step 1 with a checkpoint; the same command continues" in capsys.readouterr().out
    assert status.main([str(tmp_path)]) == 0
    assert "stopped (at step 1)" in capsys.readouterr().out


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restore signal handlers after the test."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_second_ctrl_c_is_no_failure(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), RunDir(config(model, tmp_path)) as run:
        run.begin(0)
        stop = StopSignal(run.stop_file, run.say)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)
    status.main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "stopped (at once, by Ctrl-C; the last checkpoint is of step 0)" in shown and "first error" not in shown


@pytest.mark.parametrize("group, mode", [("none", 0o700), ("read", 0o750), ("write", 0o770)])
def test_a_new_directory_is_private_unless_the_group_is_let_in(
    group: str, mode: int, model: Path, tmp_path: Path
) -> None:
    with RunDir(config(model, tmp_path / "run", f"run.group={group}")):
        assert (tmp_path / "run").stat().st_mode & 0o777 == mode
    (tmp_path / "run").chmod(0o755)
    with RunDir(config(model, tmp_path / "run", f"run.group={group}")):
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755, "the user's own choice is kept"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_exported(model: Path, tmp_path: Path, value: float) -> None:
    policy = torch.nn.Linear(2, 2)
    with torch.no_grad():
        policy.weight[0, 1] = value
    with pytest.raises(ValueError, match="1 weights of the policy are not finite after step 9, so it is not exported"):
        with RunDir(config(model, tmp_path)) as run:
            run.begin(9)
            run.finish(SimpleNamespace(chunks=[policy]), model)  # type: ignore[arg-type]
    assert not (tmp_path / "hf").exists() and not (tmp_path / "finished.json").exists()
