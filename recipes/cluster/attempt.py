"""The logs of a run, one directory per start: `RUN_DIR/logs/attempt_N`, with `latest` pointing to the newest.

Besides the logs, every role of an attempt (the batch script, each learner rank, each server) writes a small file of
events, `ROLE.events.jsonl`, one JSON object per line: when and how it started and ended. `recipes.status` reads them.
Standard library only, because node checks and server supervisors import this and must start fast.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOGS, LATEST = "logs", "latest"
VARIABLE = "GPPO_ATTEMPT_DIR"  # set by slurm/lib.sh, which makes the directory for all roles of a job
FINISHED = "finished.json"  # in the run directory, once the last step is done
STARTED = "started"  # in an attempt's directory from its first moment
STOP = "stop"  # a file in an attempt's directory: checkpoint at the next step boundary and end
_SUFFIX = ".events.jsonl"


@dataclass(frozen=True)
class Event:
    """One event of one role. ``time`` in seconds since the epoch, by that node's clock."""

    time: float
    role: str  # "job" | "learner-rank0" | "server-1" | ...
    name: str  # "started" | "ended" | "finished" | "stopped" | "failed" | ...
    details: dict[str, Any] = field(default_factory=dict)


MODES = {"none": 0o700, "read": 0o750, "write": 0o770}  # by ``run.group``


def make_run_dir(run_dir: Path, group: str) -> None:
    """Make a run's directory, which holds prompts, responses and weights; one that exists keeps its permissions."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        run_dir.mkdir(mode=0o700)
    except FileExistsError:
        return
    run_dir.chmod(MODES[group])  # whatever the umask


def attempts(run_dir: Path) -> list[Path]:
    """Directories of all attempts, oldest first."""
    found = [path for path in (run_dir / LOGS).glob("attempt_*") if path.name[8:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[8:]))


def new_attempt(run_dir: Path) -> Path:
    """Make the next attempt's directory and point `latest` at it."""
    directory = claim_attempt(run_dir)
    point_latest(directory)
    return directory


def claim_attempt(run_dir: Path, **started: Any) -> Path:
    """Make the next attempt's directory, with the job's "started" event in it from the first moment.

    Of two that do so at the same time, on any nodes, each gets a number of its own.
    """
    logs = run_dir / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".attempt.", dir=logs))
    scratch.chmod(stat.S_IMODE(logs.stat().st_mode))
    if started:
        record(scratch, "job", "started", **started)
    (scratch / STARTED).touch()  # a directory is renamed onto an empty one
    while True:
        earlier = attempts(run_dir)
        directory = logs / f"attempt_{int(earlier[-1].name[8:]) + 1 if earlier else 1}"
        try:
            scratch.rename(directory)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            continue
        return directory


def point_latest(directory: Path) -> None:
    """`latest` names this attempt from here on."""
    link = directory.parent / f".{LATEST}.{socket.gethostname()}.{os.getpid()}"
    link.symlink_to(directory.name)
    os.replace(link, directory.parent / LATEST)


def own_attempt(run_dir: Path) -> Path:
    """The directory that the batch script made for this job, or else a new one."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else new_attempt(run_dir)


def record(attempt: Path, role: str, name: str, **details: Any) -> None:
    """Append an event. If it cannot be written (a full disk), a message goes to stderr and the run continues."""
    line = json.dumps({"time": round(time.time(), 3), "event": name, **details}) + "\n"
    try:
        with (attempt / f"{role}{_SUFFIX}").open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        print(f"{role}: event {name!r} not recorded: {error}", file=sys.stderr)


def events(attempt: Path) -> list[Event]:
    """All events of an attempt in order of time. Torn lines, left by a kill, are skipped."""
    found = []
    for path in attempt.glob(f"*{_SUFFIX}"):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values = json.loads(line)
                event = Event(float(values.pop("time")), path.name.removesuffix(_SUFFIX), values.pop("event"), values)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            found.append(event)
    return sorted(found, key=lambda event: event.time)


def write_finished(run_dir: Path, steps: int) -> None:
    """Record that the run is complete with this number of steps."""
    temporary = run_dir / f".{FINISHED}"
    temporary.write_text(json.dumps({"steps": steps, "time": round(time.time(), 3)}) + "\n", encoding="utf-8")
    os.replace(temporary, run_dir / FINISHED)


def finished_steps(run_dir: Path) -> int:
    """Number of steps at which the run was complete; 0 if it never was."""
    try:
        return int(json.loads((run_dir / FINISHED).read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def checkpoint_step(run_dir: Path) -> int:
    """Step of the newest checkpoint; 0 when there is none."""
    try:
        return int((run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip().removeprefix("step_"))
    except (OSError, ValueError):
        return 0
