"""One run directory, one run: its holder is named, stale locks are ignored, a second job changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recipes.cluster import attempt, job, lock

HOLDS = """
import multiprocessing, os, sys, time
from pathlib import Path
from recipes.cluster import lock
def write():
    print(os.getpid(), flush=True)
    time.sleep(30)
held = lock.take(Path(sys.argv[1]))
if sys.argv[2] == "forks":  # as Megatron does for its writers
    multiprocessing.get_context("fork").Process(target=write).start()
else:
    print("holds", flush=True)
time.sleep(30)
"""


def start(run: Path, how: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(run), how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_forked_writer_does_not_inherit_the_lock(tmp_path: Path) -> None:
    process, child = start(tmp_path, "forks")
    process.kill()
    process.wait()
    try:
        os.kill(int(child), 0)  # it has outlived its parent
        lock.release(lock.take(tmp_path))
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_the_holder_is_named_and_waited_for_under_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, _ = start(tmp_path, "")
    who = f"process {process.pid} on {os.uname().nodename}"
    with pytest.raises(ValueError, match=f"is in use by {who}; wait or choose another"):
        lock.take(tmp_path)
    assert str(lock.holder(tmp_path)) == who, "the refused one has left the holder's name"
    monkeypatch.setenv(attempt.VARIABLE, str(tmp_path))
    monkeypatch.setattr(lock, "WAIT_S", 0.5)
    with pytest.raises(lock.RunBusy, match=f"is still held by {who} after 0 s"):  # not a user error: requeued
        lock.take(tmp_path)
    monkeypatch.setattr(lock, "WAIT_S", 20.0)
    with ThreadPoolExecutor(1) as later:
        later.submit(lambda: (time.sleep(0.3), process.kill(), process.wait()))
        lock.release(lock.take(tmp_path))
    assert not lock.is_locked(tmp_path) and lock.holder(tmp_path) is None


def test_a_node_whose_locks_hold_only_there_is_seen_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heartbeats").mkdir()
    beat = tmp_path / "heartbeats" / "rank0.json"
    beat.write_text('{"beat": 1}')
    (tmp_path / lock.FILE).write_text(json.dumps({"pid": 7, "host": "other", "job": "5", "attempt": str(tmp_path)}))
    with ThreadPoolExecutor(1) as later:
        later.submit(lambda: (time.sleep(0.3), beat.write_text('{"beat": 2}')))
        with pytest.raises(ValueError, match=r"in use by process 7 on other \(Slurm job 5\)"):
            lock.take(tmp_path)
    monkeypatch.setattr(lock, "FOREIGN_S", 0.6)
    lock.release(lock.take(tmp_path))  # it has died


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake squeue that lists the jobs in a file; returns the run directory."""
    (tmp_path / "squeue").write_text(f'#!/bin/sh\ngrep -s "^$3 " {tmp_path}/jobs | cut -d" " -f2\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "run"


def test_a_second_job_is_refused_while_the_first_lives(slurm: Path) -> None:
    assert job.busy(slurm, "8") == ""
    first = attempt.claim_attempt(slurm, job="7", nodes="n1", step=0)
    attempt.point_latest(first)
    jobs = slurm.parent / "jobs"
    jobs.write_text("7 RUNNING\n")
    assert job.busy(slurm, "8") == "Slurm job 7 on n1" and job.busy(slurm, "7") == "", "its own requeue"
    mine = attempt.claim_attempt(slurm, job="8", nodes="n2", step=0)
    assert job.busy(slurm, "8", before=mine) == "Slurm job 7 on n1", "both at the same moment: the later one goes"
    assert job.busy(slurm, "7", before=first) == ""
    assert (slurm / "logs" / "latest").resolve() == first
    jobs.write_text("")
    assert job.busy(slurm, "8", before=mine) == "", "killed without a word"
    attempt.record(first, "job", "finished")
    jobs.write_text("7 RUNNING\n")
    assert job.busy(slurm, "8", before=mine) == "", "done, its batch script just ending"


def test_attempts_of_many_jobs_never_share_a_number(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as jobs:
        made = list(jobs.map(lambda number: attempt.claim_attempt(tmp_path, job=str(number)), range(24)))
    assert sorted(int(path.name[8:]) for path in made) == list(range(1, 25))
    assert {e.details["job"] for path in made for e in attempt.events(path)} == {str(n) for n in range(24)}
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == sorted(path.name for path in made)
