"""A run with several ranks in a terminal: Ctrl-C saves and ends, and nothing outlives its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from training import arguments

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 120.0


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def words(model: Path, tmp_path: Path) -> list[str]:
    endless = ("train.steps=100000", "eval.every=0", "parallel.tp=2", "train.save_every=0")
    return arguments(model, tmp_path / "run", *endless)


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """In a process group of its own, as a shell starts a command."""
    command = [sys.executable, "-m", "recipes.train", *words]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True
    )


def test_ctrl_c_saves_and_a_killed_launcher_takes_its_ranks_along(words: list[str], tmp_path: Path) -> None:
    metrics, log = tmp_path / "run" / "metrics.jsonl", tmp_path / "log"
    trainer = start(words, log)
    try:
        wait_for(lambda: trainer.poll() is not None or (metrics.is_file() and metrics.stat().st_size))
        assert trainer.poll() is None, log.read_text()
        os.killpg(trainer.pid, signal.SIGINT)
        trainer.wait(TIMEOUT_S)  # torchrun ends with status 1 and words of its own
        assert (
            "stopping after this step" in log.read_text() and "with a checkpoint; the same command" in log.read_text()
        )
        saved = int((tmp_path / "run" / "checkpoints" / "latest").read_text().removeprefix("step_"))

        done = len(metrics.read_text().splitlines())
        assert done == saved
        trainer = start(words, log)
        wait_for(lambda: trainer.poll() is not None or len(metrics.read_text().splitlines()) > done)
        assert trainer.poll() is None, log.read_text()
        children = psutil.Process(trainer.pid).children(recursive=True)
        ranks = [child for child in children if "recipes.train" in " ".join(child.cmdline())]
        assert len(ranks) == 2, children
        trainer.kill()
        trainer.wait()
        _, alive = psutil.wait_procs(ranks, timeout=30)
        assert alive == []
    finally:
        if trainer.poll() is None:
            os.killpg(trainer.pid, signal.SIGKILL)
