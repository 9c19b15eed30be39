"""Signals between a terminal and ranks, with small processes in place of torchrun and its ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from recipes.cluster import foreground

# torchrun: starts a rank in a new session and returns its exit status.
TORCHRUN = """
import subprocess, sys
rank = [sys.executable, "-I", "-S", "-c", *sys.argv[1:]]
sys.exit(subprocess.Popen(rank, start_new_session=True).wait())
"""
# A rank: dies with torchrun, records every signal, and ends half a second after the first one unless told to stay.
RANK = """
import ctypes, signal, sys, time
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
def told(number, _):
    open(sys.argv[1], "a").write(f"{number} ")
signal.signal(signal.SIGINT, told); signal.signal(signal.SIGTERM, told)
open(sys.argv[1], "w").close()
while sys.argv[2] == "stays" or not open(sys.argv[1]).read(): time.sleep(0.02)
time.sleep(0.5)
sys.exit(7)
"""
FOREGROUND = """
import sys
sys.path.insert(0, sys.argv[1])
import foreground
foreground.GRACE_S = 0.3
sys.exit(foreground.run(sys.argv[2:]))
"""


@contextmanager
def started(said: Path, rank: str) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """The foreground process and its descendants, once the rank is ready."""
    python = [sys.executable, "-I", "-S", "-c"]
    folder = str(Path(foreground.__file__).parent)
    command = [*python, FOREGROUND, folder, *python, TORCHRUN, RANK, str(said), rank]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            wait_for(said)
            yield process, psutil.Process(process.pid).children(recursive=True)
        finally:
            process.kill()


def wait_for(said: Path, text: str = "") -> None:
    deadline = time.monotonic() + 60
    while not said.exists() or text not in said.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_reaches_the_rank_alone_and_waits_for_its_end(tmp_path: Path, number: int) -> None:
    with started(tmp_path / "said", "ends") as (process, below):
        assert len(below) == 2
        process.send_signal(number)
        assert process.wait(60) == 7, "the rank's own status: nobody killed it"
    assert (tmp_path / "said").read_text().split() == [str(int(number))], "once, and not by torchrun too"


def test_the_second_signal_ends_everything_soon(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with started(said, "stays") as (process, below):
        process.send_signal(signal.SIGTERM)
        wait_for(said, str(int(signal.SIGTERM)))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == foreground.INTERRUPTED
        assert psutil.wait_procs(below, timeout=60)[1] == []
    assert said.read_text().split() == [str(int(signal.SIGTERM)), str(int(signal.SIGINT))]


def test_nothing_outlives_it(tmp_path: Path) -> None:
    with started(tmp_path / "said", "stays") as (process, below):
        process.kill()
        assert psutil.wait_procs(below, timeout=60)[1] == []


def test_without_ranks_a_signal_ends_it_at_once(tmp_path: Path) -> None:
    folder = str(Path(foreground.__file__).parent)
    wait = "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(600)"
    python = [sys.executable, "-I", "-S", "-c"]
    with subprocess.Popen([*python, FOREGROUND, folder, *python, wait, str(tmp_path / "said")]) as process:
        wait_for(tmp_path / "said")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == foreground.INTERRUPTED
