"""A run with several ranks in a terminal: Ctrl-C saves and ends, a second one ends at once, and no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from training import arguments

from recipes import status

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 120.0


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ranks_handle_signals(trainer: subprocess.Popen[bytes]) -> bool:
    """Whether both ranks have installed `StopSignal`; one that has not ends at the first Ctrl-C."""
    try:
        below = psutil.Process(trainer.pid).children(recursive=True)
        ranks = [p for p in below if "RANK" in p.environ() and "RANK" not in psutil.Process(p.ppid()).environ()]
        lines = [Path(f"/proc/{rank.pid}/status").read_text().partition("SigCgt:\t")[2].split()[0] for rank in ranks]
    except (psutil.Error, OSError):
        return False  # one ended meanwhile
    return len(ranks) == 2 and all(int(line, 16) >> (signal.SIGUSR1 - 1) & 1 for line in lines)


def start(words: list[str], log: Path, folder: Path = REPOSITORY) -> subprocess.Popen[bytes]:
    """Start in a separate process group, as a shell does; custom modules are imported from ``folder``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])}
    return subprocess.Popen(
        [sys.executable, "-m", "recipes.train", *words],
        cwd=REPOSITORY,
        env=environment,
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def test_ctrl_c_saves_and_a_second_one_leaves_at_once(model: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    metrics = run_dir / "metrics.jsonl"
    endless = ("train.steps=100000", "eval.every=0", "parallel.tp=2", "train.save_every=0")
    trainer = start(arguments(model, run_dir, *endless), log)
    try:
        wait_for(lambda: trainer.poll() is not None or (metrics.is_file() and metrics.stat().st_size))
        assert trainer.poll() is None, log.read_text()
        os.killpg(trainer.pid, signal.SIGINT)
        assert trainer.wait(TIMEOUT_S) == 0, log.read_text()
        said = log.read_text()
        assert "stopping after this step" in said and "with a checkpoint; the same command" in said
        saved = int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))
        assert len(metrics.read_text().splitlines()) == saved
        assert status.state(run_dir, time.time()) == ("stopped", f"at step {saved}")
    finally:
        if trainer.poll() is None:
            os.killpg(trainer.pid, signal.SIGKILL)

    # A step that would take minutes.
    run_dir, log = tmp_path / "slow", tmp_path / "slow-log"
    (tmp_path / "slow_reward.py").write_text("import time\ndef sleep(text): time.sleep(600)\n")
    slow = ("reward.name=slow_reward:sleep", "reward.timeout_s=500")
    trainer = start(arguments(model, run_dir, *endless, *slow), log, tmp_path)
    try:
        events = run_dir / "logs" / "latest" / "learner.events.jsonl"
        wait_for(lambda: trainer.poll() is not None or (events.exists() and '"engine"' in events.read_text()))
        wait_for(lambda: trainer.poll() is not None or ranks_handle_signals(trainer))
        assert trainer.poll() is None, log.read_text()
        below = psutil.Process(trainer.pid).children(recursive=True)
        os.killpg(trainer.pid, signal.SIGINT)
        wait_for(lambda: "Ctrl-C again leaves at once" in log.read_text())
        os.killpg(trainer.pid, signal.SIGINT)
        trainer.wait(30)
        _, alive = psutil.wait_procs(below, timeout=30)
        assert alive == []
        words = "at once, by Ctrl-C; the last checkpoint is of step 0"
        assert status.state(run_dir, time.time()) == ("stopped", words), log.read_text()
    finally:
        if trainer.poll() is None:
            os.killpg(trainer.pid, signal.SIGKILL)
