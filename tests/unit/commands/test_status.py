"""Attempts and their events, the job's requeue cap, and the output of `recipes.status` for a run directory."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from recipes import status
from recipes.cluster import attempt, requeue
from recipes.cluster.blame import first_error

NOW = 1_700_000_000.0  # in the past, so that events recorded during a test are later


def write(directory: Path, role: str, *events: dict[str, object]) -> None:
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (directory / f"{role}.events.jsonl").write_text(lines)


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "latest").write_text(f"step_{step:06d}\n")


def job_attempt(run: Path, name: str, step: int, *events: str) -> Path:
    directory = attempt.new_attempt(run)
    started = {"time": NOW, "event": "started", "job": name, "step": step}
    write(directory, "job", started, *({"time": NOW + 1, "event": event} for event in events))
    return directory


def test_attempts_are_numbered_and_linked(tmp_path: Path) -> None:
    for _ in range(11):
        last = attempt.new_attempt(tmp_path)
    assert [path.name for path in attempt.attempts(tmp_path)] == [f"attempt_{i}" for i in range(1, 12)]
    assert (tmp_path / "logs" / "latest").resolve() == last.resolve()
    assert attempt.own_attempt(tmp_path).name == "attempt_12"


def test_the_batch_script_decides_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(attempt.VARIABLE, str(tmp_path / "given"))
    assert attempt.own_attempt(tmp_path) == tmp_path / "given" and not attempt.attempts(tmp_path)


def test_events_come_in_order_of_time_and_torn_lines_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, "server-0", {"time": 5, "event": "ready"}, {"time": 9, "event": "failed", "error": "x"})
    write(tmp_path, "learner", {"time": 7, "event": "started", "step": 3})
    with (tmp_path / "learner.events.jsonl").open("a") as file:
        file.write('[1]\n{"time": 8}\n{"time": 8, "eve')
    found = attempt.events(tmp_path)
    assert [(e.role, e.name) for e in found] == [("server-0", "ready"), ("learner", "started"), ("server-0", "failed")]
    assert found[1].details == {"step": 3}


def test_recording_survives_a_directory_that_is_gone(tmp_path: Path) -> None:
    attempt.record(tmp_path / "gone", "learner", "started")
    attempt.record(tmp_path, "learner", "started", step=2)
    assert attempt.events(tmp_path)[0].details == {"step": 2}


def test_requeues_without_progress_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_REQUEUES", "2")
    job_attempt(tmp_path, "1", 0)  # another job's: a user has submitted it again
    for _ in range(2):
        job_attempt(tmp_path, "2", 0)
    assert requeue.idle_attempts(tmp_path, "2") == 2 and requeue.may_start(tmp_path, "2")
    job_attempt(tmp_path, "2", 0)
    assert not requeue.may_start(tmp_path, "2"), "the first start and two requeues"
    assert requeue.may_start(tmp_path, "3")
    checkpoint(tmp_path, 20)
    assert requeue.idle_attempts(tmp_path, "2") == 0, "a newer checkpoint is progress"
    job_attempt(tmp_path, "2", 20)
    assert requeue.idle_attempts(tmp_path, "2") == 1


@pytest.mark.parametrize(
    "events, expected",
    [((), "running"), (("failed", "requeued"), "queued"), (("cancelled",), "cancelled"), (("refused",), "refused")],
)
def test_states_of_a_job(tmp_path: Path, events: tuple[str, ...], expected: str) -> None:
    job_attempt(tmp_path, "7", 0, *events)
    assert status.state(tmp_path, NOW + 30)[0] == expected


def test_a_job_without_a_sign_of_life_is_lost(tmp_path: Path) -> None:
    job_attempt(tmp_path, "7", 0)
    assert status.state(tmp_path, NOW + 300) == (
        "lost",
        "no heartbeat for 5.0 min: node lost, or requeued and waiting",
    )
    attempt.write_finished(tmp_path, 9)
    assert status.state(tmp_path, NOW + 300)[0] == "finished"


def test_states_without_slurm(tmp_path: Path) -> None:
    assert status.state(tmp_path, NOW)[0] == "new"
    directory = attempt.new_attempt(tmp_path)
    write(directory, "learner", {"time": NOW, "event": "started", "step": 0})
    assert status.state(tmp_path, NOW) == ("lost", "ended without a final event: killed?")
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert status.state(tmp_path, NOW) == ("running", "")
    attempt.record(directory, "learner", "stopped", step=4)
    assert status.state(tmp_path, NOW)[0] == "stopped"


def test_the_first_error_is_the_earliest_with_the_end_of_its_log(tmp_path: Path) -> None:
    assert first_error(tmp_path) is None
    write(tmp_path, "learner-rank1", {"time": 5, "event": "ended", "code": 137})
    write(tmp_path, "learner-rank0", {"time": 6, "event": "ended", "code": 1})
    write(tmp_path, "server-0", {"time": 1, "event": "ended", "code": 0})
    (tmp_path / "learner-rank1.log").write_text("\n".join(f"line {i}" for i in range(30)) + "\n\n")
    error = first_error(tmp_path)
    assert error is not None and (error.role, error.what) == ("learner-rank1", "ended with status 137 (signal 9)")
    assert error.tail == [f"line {i}" for i in range(22, 30)]


def test_the_whole_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 100}\n")
    row = {"critic/rewards/mean": 0.5, "actor/entropy": 1.25, "perf/throughput": 1000.0, "timing_s/step": 30.0}
    rows = [{"step": step, **row, **({"val-core/chain/avg@8": 0.75} if step == 20 else {})} for step in range(1, 41)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 41, "cri')
    checkpoint(tmp_path, 40)
    directory = job_attempt(tmp_path, "7", 20)
    write(directory, "server-0", {"time": NOW, "event": "ready"})
    write(directory, "server-1", {"time": NOW, "event": "failed", "error": "died"}, {"time": NOW + 1, "event": "ready"})
    lines = dict(status.describe(tmp_path, NOW + 10))
    assert lines["state"] == "running (job 7)" and lines["step"] == "40 of 100" and lines["checkpoint"] == "step 40"
    assert lines["last step"] == "reward 0.5, entropy 1.25" and lines["evaluation"] == "step 20: chain/avg@8 0.750"
    assert lines["speed"] == "1000 tokens/s, 30 s a step, 30.0 min left"
    assert lines["servers"] == "2 of 2 ready, 1 restarts" and "first error" not in lines
    attempt.record(directory, "job", "failed")
    assert "first error" not in dict(status.describe(tmp_path, NOW + 10)), "the server has recovered"
    write(directory, "learner", {"time": NOW + 2, "event": "failed", "error": "OutOfMemoryError: x"})
    assert "learner-rank0 of attempt_1" in dict(status.describe(tmp_path, NOW + 10))["first error"]
    assert status.main([str(tmp_path)]) == 0 and "40 of 100" in capsys.readouterr().out


def test_status_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(tmp_path / "none")]) == 2 and "no such directory" in capsys.readouterr().err
    assert status.main([str(tmp_path)]) == 2 and "give the run.dir of a run" in capsys.readouterr().err
