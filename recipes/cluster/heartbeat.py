"""A rank's heartbeat file, written by a process of its own (`recipes.cluster.beat`), with the standard library only.

`start` starts it for every rank. It tells what the rank does (the record of
`megatron_ext.progress`), how its process is (running, stopped, gone) and, once an operation takes long, where
its main thread is. FILE is written in place, so that a file server shows the newest content to whoever opens it.
Where no batch script watches the heartbeats, rank 0's process does (`recipes.cluster.watch.Guard`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECTORY = "heartbeats"  # in the attempt's directory
SIZE = 1024
# Seconds without progress in a phase before it counts as hung; others have ``run.hang_s``. None: not watched.
LIMITS: dict[str, float | None] = {
    "start": 1800.0,
    "load": 3600.0,
    "sync": 1800.0,
    "save": 3600.0,
    "report": 600.0,
    "finish": 3600.0,
}
FIRST_TIME = 10  # a phase's first pass compiles kernels and opens connections: that many times its limit
DEBUGGER = "in the debugger"
COLLECTIVE = re.compile(r'File ".*/(torch/distributed/\S+|megatron_ext/learner/control)\.py", line (\d+) in (\w+)')


def start(
    attempt: Path,
    rank: int,
    record: int,
    hang_s: float,
    limits: Mapping[str, float],
    *,
    guarded_ranks: int = 0,
    flight: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start this process's heartbeat.

    Args:
        record: descriptor from `progress.open_record`.
        guarded_ranks: above 0, it also watches the heartbeats of so many ranks and ends a run that hangs.
        flight: descriptor that has collectives recorded, from `flight.listen`.
    """
    directory = attempt / DIRECTORY
    directory.mkdir(exist_ok=True)
    stacks = (directory / f"rank{rank}.stacks").open("w")
    faulthandler.register(signal.SIGUSR2, stacks, all_threads=True)  # works without the interpreter lock
    settings = {"hang_s": hang_s, "limits": {**LIMITS, **limits}, "rank": rank, "stacks": stacks.name}
    settings |= {"guarded_ranks": guarded_ranks, "flight": flight}
    words = [str(os.getpid()), str(record), str(directory / f"rank{rank}.json"), json.dumps(settings)]
    command = [sys.executable, "-I", "-S", str(Path(__file__).resolve().with_name("beat.py")), *words]
    handed = [record] if flight is None else [record, flight]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=handed, start_new_session=True)


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def stop(process: subprocess.Popen[bytes]) -> None:
    """Let it write the last phase, and end."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


@dataclass(frozen=True)
class Process:
    """What /proc says of a process."""

    state: str = ""  # R running, S asleep, D in the kernel, T stopped, Z dead; "": gone
    terminal: bool = False  # it has a controlling one
    born: int = 0  # ticks since boot: with the pid, this names one process for good


def process(pid: int) -> Process:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return Process()
    return Process(fields[0], int(fields[4]) != 0, int(fields[19]))


class Heart:
    """What one round knows from those before it."""

    def __init__(self, pid: int, memory: mmap.mmap, settings: Mapping[str, Any]) -> None:
        self._pid, self._memory, self._settings = pid, memory, settings
        self._record: dict[str, Any] = {
            "phase": "start",
            "operation": "",
            "step": 0,
            "phases": 0,
            "done": 0,
            "since": 0.0,
        }
        self._asked = -1  # the operation whose stack was asked for
        self._last = time.monotonic()
        self._stopped_s = 0.0  # of the present operation: Ctrl-Z is no hang, and what follows `fg` is none either
        self._operation = -1
        self._beats = 0

    def beat(self) -> dict[str, Any]:
        """The next heartbeat."""
        with contextlib.suppress(ValueError):  # just being written
            self._record = json.loads(bytes(self._memory[:]))
        record, rank = self._record, process(self._pid)
        age = self._age(rank.state)
        limit = self._limit(record["phase"], record["first"])
        where = self._where(record["done"], rank.state) if limit is not None and age > limit / 2 else ""
        limit = None if where == DEBUGGER else limit
        self._beats += 1
        return {
            "beat": self._beats,
            "node": node_name(),
            "rank": self._settings["rank"],
            "pid": self._pid,
            "born": rank.born,
            "terminal": rank.terminal,
            "state": rank.state,
            **{key: record[key] for key in ("phase", "operation", "step", "phases")},
            "age": round(age, 1),
            "limit": limit,
            "where": where,
            "hang_s": self._settings["hang_s"],
        }

    def _age(self, state: str) -> float:
        """Seconds since the rank got something done, without those in which it was stopped."""
        now, done = time.monotonic(), self._record.get("done", 0)
        if done != self._operation:
            self._operation, self._stopped_s = done, 0.0
        elif state in ("T", "t"):
            self._stopped_s += now - self._last
        self._last = now
        return float(now - self._record["since"] - self._stopped_s)

    def _limit(self, phase: str, first: bool) -> float | None:
        limit: float | None = self._settings["limits"].get(phase, self._settings["hang_s"])
        compiling = first and phase not in self._settings["limits"]
        return limit * FIRST_TIME if limit is not None and compiling else limit

    def _where(self, done: int, state: str) -> str:
        """The call into torch.distributed that the main thread is in, or the innermost line of it."""
        if state in ("T", "t", "Z", ""):
            return ""
        if self._asked != done:
            self._asked = done
            with contextlib.suppress(OSError):
                os.truncate(self._settings["stacks"], 0)
                os.kill(self._pid, signal.SIGUSR2)
                time.sleep(0.2)
            self._ask_flight_recorder()
        with contextlib.suppress(OSError):
            return main_thread(Path(self._settings["stacks"]).read_text(errors="replace"))
        return ""

    def _ask_flight_recorder(self) -> None:
        """Have torch write what its collectives did: the rank itself, and NCCL's watchdog, which needs no Python."""
        if self._settings["flight"] is not None:
            with contextlib.suppress(OSError):  # the rank is gone
                os.write(self._settings["flight"], b"1")
        if prefix := os.environ.get("TORCH_NCCL_DEBUG_INFO_PIPE_FILE"):
            with contextlib.suppress(OSError):  # no pipe, or nobody reads it
                pipe = os.open(f"{prefix}{self._settings['rank']}.pipe", os.O_WRONLY | os.O_NONBLOCK)
                os.write(pipe, b"1\n")
                os.close(pipe)


def main_thread(stacks: str) -> str:
    """From faulthandler's text: "waits in NAME (FILE:LINE)" for a collective, else "in NAME (FILE:LINE)"."""
    blocks = [block for block in stacks.split("\n\n") if "most recent call first" in block]
    lines = blocks[-1].splitlines()[1:] if blocks else []  # the main thread comes last
    calls = [found for line in lines if (found := re.search(r'File "(.+)", line (\d+) in (\S+)', line))]
    if not calls:
        return ""
    if any(re.search(r"/(pdb|bdb)\.py$", found[1]) for found in calls):
        return DEBUGGER
    inside = [found for line in lines if (found := COLLECTIVE.search(line))]
    if inside:
        outermost = inside[-1]
        return f"waits in {outermost[3]} ({outermost[1].rpartition('/')[2]}.py:{outermost[2]})"
    return f"in {calls[0][3]} ({os.path.basename(calls[0][1])}:{calls[0][2]})"
