"""Detection of a hanging rank, from synthetic heartbeats and with real processes that stop in three ways."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from recipes.cluster import heartbeat, watch
from recipes.cluster.attempt import events
from recipes.cluster.heartbeat import main_thread
from recipes.cluster.watch import Rank, culprits, sentence

HANG_S = 60.0


def rank(number: int, phase: str = "update", age: float = 0.0, **values: float | str | None) -> Rank:
    limits = {"rollout": 660.0, "save": 3600.0, "sync": 1800.0}
    fields = {"limit_s": limits.get(phase, HANG_S), "phases": 7, "step": 11} | values
    return Rank(number, f"node{number // 2 + 1}", phase, age_s=age, **fields)  # type: ignore[arg-type]


WAITS, LOOPS = "waits in all_reduce (distributed_c10d.py:2900)", "in pack (packing.py:80)"


@pytest.mark.parametrize(
    "ranks, named",
    [
        # No hang: all compute; one waits for a peer with more micro-batches; all wait for rank 0's rollouts.
        ([rank(0), rank(1, age=20)], []),
        ([rank(0, age=300, where=WAITS), rank(1, age=3)], []),
        ([rank(0, "rollout", age=100), *(rank(i, "rollout", age=900, where=WAITS) for i in (1, 2, 3))], []),
        ([rank(0, "save", age=900), rank(1, "save", age=900, where=WAITS)], []),
        # One stopped, lost with its node, or gone: it is named at once, not the ranks that wait for it.
        ([rank(0, age=70, where=WAITS), rank(1, age=70, stopped_s=55.0)], [1]),
        ([rank(0, "rollout", age=700, where=WAITS), rank(1, "rollout", age=1, stopped_s=55.0)], [1]),
        ([rank(0, age=55, where=WAITS), rank(1, age=2, silent_s=55.0), rank(2, age=55, where=WAITS)], [1]),
        # Stuck but running: first the rank that waits for no other, then the one behind, then the first to stop.
        ([rank(0, age=56, where=WAITS), rank(1, age=57, where=LOOPS)], [1]),
        ([rank(0, age=57, where=WAITS, phases=8), rank(1, age=56, where=WAITS, phases=7)], [1]),
        ([rank(0, age=52, where=WAITS), rank(1, age=60, where=WAITS)], [1]),
        # All others wait for rollouts; rank 1 is still in the previous update.
        ([rank(0, "rollout", age=30, phases=8), rank(1, age=58, where=LOOPS)], [1]),
        # A single rank.
        ([rank(0, age=55, where=LOOPS)], [0]),
        ([rank(0, "rollout", age=655.0)], [0]),
        # A rank that has ended does not hang.
        ([rank(0, "end", age=900, stopped_s=900.0), rank(1, "finish", limit_s=3600.0)], []),
    ],
)
def test_the_culprit_is_named_and_not_those_that_wait(ranks: list[Rank], named: list[int]) -> None:
    assert [r.rank for r in culprits(ranks, HANG_S)] == named


def test_the_sentence_says_who_where_and_since_when() -> None:
    stuck = rank(1, age=57.2, where=LOOPS, operation="micro-batch 3 of 9")
    assert sentence(culprits([rank(0, age=56, where=WAITS), stuck], HANG_S), 2) == (
        "node1: learner rank 1 has made no progress for 57 s (in update of step 12, micro-batch 3 of 9, "
        "in pack (packing.py:80)); the other 1 wait"
    )


def test_faulthandler_text_is_understood() -> None:
    text = (
        'Thread 0x01 (most recent call first):\n  File "/x/threading.py", line 1 in wait\n\n'
        'Current thread 0x02 (most recent call first):\n  File "/v/torch/distributed/c10d_logger.py", line 9 in w\n'
        '  File "/v/torch/distributed/distributed_c10d.py", line 2900 in all_reduce\n'
        '  File "/r/megatron_ext/learner/learner.py", line 5 in update\n'
    )
    assert main_thread(text) == "waits in all_reduce (distributed_c10d.py:2900)"
    assert main_thread(text.replace("torch/distributed", "numpy")) == "in w (c10d_logger.py:9)"


def test_time_in_which_a_rank_was_stopped_is_not_held_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z for an hour, then `fg`."""
    now = 100.0
    memory = mmap.mmap(-1, 512)

    def note(done: int, since: float) -> None:
        record = {"phase": "update", "operation": "", "step": 1, "phases": 3, "done": done, "since": since}
        memory[:] = json.dumps(record | {"first": False}).encode().ljust(512)

    def beat(state: str, seconds: float) -> float:
        nonlocal now
        now += seconds
        monkeypatch.setattr(heartbeat, "process", lambda pid: heartbeat.Process(state))
        return float(heart.beat()["age"])

    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    monkeypatch.setattr(heartbeat.Heart, "_where", lambda *_: "")
    note(5, 100.0)
    heart = heartbeat.Heart(1, memory, {"limits": {}, "hang_s": 60.0, "rank": 0})
    assert beat("S", 3.0) == 3.0
    assert beat("T", 5.0) == 3.0
    for _ in range(700):
        assert beat("T", 5.0) == 3.0
    assert beat("S", 5.0) == 8.0
    note(6, now)
    assert beat("S", 2.0) == 2.0 and beat("S", 5.0) == 7.0


RANK = """
import ctypes, os, signal, sys, time
from pathlib import Path
from typing import Any
from megatron_ext import progress
from recipes.cluster import heartbeat
how, attempt, number, guarded = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
record = progress.open_record()
heartbeat.start(attempt, number, record, 2.0, {"start": 2.0}, guarded_ranks=guarded)
for step in range(3):  # work, then hang
    progress.at("statistics", step=step); time.sleep(0.05)
    progress.at("update", step=step); time.sleep(0.05)
progress.beat("micro-batch 2 of 4")
if how == "debugs": breakpoint()
if how == "stopped": os.kill(os.getpid(), signal.SIGSTOP)
if how == "holds the lock": ctypes.PyDLL(None).sleep(60)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["sleeps", "stopped", "holds the lock"])
def test_real_processes(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asleep with an active heartbeat, stopped, and inside a call that holds the interpreter's lock."""
    monkeypatch.setattr(watch, "POLL_S", 0.5)
    words = [sys.executable, "-c", RANK]
    process = subprocess.Popen([*words, how, str(tmp_path), "0", "0"])
    try:
        file = tmp_path / "heartbeats" / "rank0.json"
        while not file.exists() or (how != "holds the lock" and "micro-batch" not in file.read_text()):
            time.sleep(0.05)
        begin = time.monotonic()
        assert watch.main([str(tmp_path), "--ranks", "1"]) == watch.STATUS
        assert time.monotonic() - begin < 30.0, "2 s, and those of a busy machine"
        (event,) = events(tmp_path)
        assert event.role == "learner-rank0" and event.name == "failed"
        said = str(event.details["error"])
        assert said.startswith(f"{os.uname().nodename}: learner rank 0 ") and "(in update of step 3" in said
        assert "is stopped or gone" in said if how == "stopped" else "has made no progress" in said
        assert "[watch] hung:" in capsys.readouterr().out
        assert (tmp_path / watch.HUNG_NODES).read_text().split() == [os.uname().nodename]
        if how == "sleeps":
            assert "in <module> (<string>" in said, "where it is, from its stack"
    finally:
        process.kill()
        process.wait()


def started(how: str, directory: Path, **options: Any) -> subprocess.Popen[bytes]:
    """A rank with its own watchdog, in the last operation that it completes."""
    words = [sys.executable, "-c", RANK, how, str(directory), "0", "1"]
    rank_process = subprocess.Popen(words, start_new_session=True, **options)
    file = directory / "heartbeats" / "rank0.json"
    while not file.exists() or "micro-batch" not in file.read_text():
        assert rank_process.poll() is None
        time.sleep(0.05)
    return rank_process


@pytest.mark.parametrize("how", ["sleeps", "stopped"])
def test_without_a_batch_system_the_run_ends(how: str, tmp_path: Path) -> None:
    """No external watcher exists: rank 0's heartbeat ends the process and reports the reason."""
    with (tmp_path / "err").open("wb") as err:
        hung = started(how, tmp_path, stderr=err)
    assert hung.wait(30) == -signal.SIGKILL
    said = (tmp_path / "err").read_text()
    assert said.startswith(f"error: hung: {os.uname().nodename}: learner rank 0 ") and said.count("\n") == 1
    assert re.search(r" (no progress|stopped or gone) for \d+ s \(in update of step 3", said)
    (event,) = events(tmp_path)
    assert (event.role, event.details["hung"]) == ("learner-rank0", True)


def test_a_user_who_stops_or_debugs_a_run_is_left_alone(tmp_path: Path) -> None:
    """Ctrl-Z, or a breakpoint, for longer than the limit."""
    runs, terminals = [], []
    for how in ("stopped", "debugs"):
        (tmp_path / how).mkdir()
        terminals += (pair := os.openpty())
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), pair[1])
        runs.append(started(how, tmp_path / how, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), **streams))
    suspended, debugged = runs
    try:
        time.sleep(3.5)
        assert suspended.poll() is None and debugged.poll() is None
        os.kill(suspended.pid, signal.SIGCONT)
        assert suspended.wait(30) == -signal.SIGKILL, "what it does then is watched as before"
        assert debugged.poll() is None
    finally:
        for one in runs:
            one.kill()
            one.wait()
        for descriptor in terminals:
            os.close(descriptor)
