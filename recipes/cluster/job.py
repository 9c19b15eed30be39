"""How a job begins: slurm/lib.sh asks Python, so that a shell script decides nothing about configurations.

    python -m recipes.cluster.job key=value ...   check everything, make the attempt's directory, print NAME=value

Ends with status 2 and one sentence for a user's error, and with 3 when the job has been requeued too often without
progress; neither is worth another requeue.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from configs.schema import Config
from recipes.checks.cli import wants_help
from recipes.checks.model import check_model
from recipes.checks.settings import load_checked
from recipes.cluster import attempt, lock
from recipes.cluster.requeue import exhausted, may_start
from recipes.cluster.serve import OPTIONS_FILE, Port, port_candidates
from recipes.cluster.transport import transport
from recipes.models.locate import model_location, prepare_model

ALIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING")
HEARTBEAT_S = 15.0  # the batch script's comes every second; file servers may show it late
HELP = """usage: python -m recipes.cluster.job key=value ...

Check a run and open its next attempt; what slurm/lib.sh runs at the beginning of a job. Prints NAME=value lines for
the batch script: STATE (ready, finished or exhausted), RUN_DIR, ATTEMPT_DIR, MASTER_PORT, SYNC_DIR, SERVED.

Exit status: 0; 2 for a user's error, with one sentence; 3 when the job was requeued too often without progress.
Needs SLURM_JOB_ID."""


def busy(run_dir: Path, job: str, before: Path | None = None) -> str:
    """Who else runs in this directory, "" when nobody does: another job's attempt that lives, or another's lock.

    ``before``: only attempts older than this one count. A leftover of this very job does not: rank 0 waits for it.
    """
    if lock.is_locked(run_dir) and (who := lock.holder(run_dir)) is not None and who.job != job:
        return str(who)
    for directory in reversed(attempt.attempts(run_dir)):
        if before is not None and int(directory.name[8:]) >= int(before.name[8:]):
            continue
        events = [event for event in attempt.events(directory) if event.role == "job"]
        if events and events[-1].name == "started" and (other := str(events[0].details.get("job"))) != job:
            return f"Slurm job {other} on {events[0].details.get('nodes')}" if job_runs(other, directory) else ""
        return ""
    return ""


def job_runs(job: str, directory: Path) -> bool:
    """Whether Slurm says so, or, where it cannot be asked, whether its batch script's heartbeat changes."""
    state = squeue_state(job)
    return _beats(directory) if state is None else state in ALIVE


def squeue_state(job: str) -> str | None:
    """What squeue says of a job, "" when it has ended; None when there is no answer."""
    command = ["squeue", "-h", "-j", job, "-o", "%T"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):  # absent from most containers
        return None
    return told.stdout.strip() if told.returncode == 0 or "Invalid job id" in told.stderr else None


def _beats(directory: Path) -> bool:
    def beat() -> str:
        try:
            return (directory / "heartbeat").read_text(encoding="utf-8")
        except OSError:
            return ""

    first, deadline = beat(), time.monotonic() + HEARTBEAT_S
    while time.monotonic() < deadline:
        if beat() != first:
            return True
        time.sleep(0.5)
    return False


def begin(words: Sequence[str]) -> dict[str, str | int]:
    """Check the run and open its next attempt; the variables that the batch script continues with.

    Raises ValueError for a user's error. ``STATE`` is "ready", "finished" (nothing is left to do) or "exhausted".
    """
    config = load_checked(words)
    run_dir, job = Path(config.run.dir).absolute(), os.environ["SLURM_JOB_ID"]
    if attempt.finished_steps(run_dir) >= config.train.steps:
        return {"STATE": "finished", "RUN_DIR": str(run_dir)}
    if who := busy(run_dir, job):
        raise ValueError(f"run.dir={run_dir} is in use by {who}; wait for it, or set run.dir to another directory")
    if not may_start(run_dir, job):
        return {"STATE": "exhausted", "RUN_DIR": str(run_dir)}
    model_dir = model_location(config)
    prepare_model(config, model_dir)
    check_model(config, model_dir)
    attempt.make_run_dir(run_dir, config.run.group)
    directory = attempt.claim_attempt(
        run_dir,
        job=job,
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        step=attempt.checkpoint_step(run_dir),
        nodes=os.environ.get("SLURM_JOB_NODELIST", ""),
    )
    if who := busy(run_dir, job, before=directory):  # it began at the same moment
        shutil.rmtree(directory)
        raise ValueError(f"run.dir={run_dir} is in use by {who}; wait for it, or set run.dir to another directory")
    attempt.point_latest(directory)
    (directory / "nonce").write_text(secrets.token_hex(8), encoding="utf-8")
    options = server_options(config, model_dir)
    (directory / OPTIONS_FILE).write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")
    master_port = Port("", port_candidates(int(job), 0))
    master_port.release()  # the learner's rank 0, on this node, listens on it in a moment
    weight_sync, _ = transport(config)
    return {
        "STATE": "ready",
        "RUN_DIR": str(run_dir),
        "ATTEMPT_DIR": str(directory),
        "MASTER_PORT": master_port.number,
        # Servers on other nodes do not see this one's /dev/shm.
        "SYNC_DIR": (config.rollout.sync_dir or str(run_dir / "sync")) if weight_sync == "disk" else "",
        "WEIGHT_SYNC": weight_sync,
        "SERVED": int(config.rollout.engine != "local" and config.rollout.replay is None),
    }


def server_options(config: Config, model_dir: Path) -> dict[str, object]:
    """What the supervisors start servers with, as JSON; the device is found where the server runs."""
    return {"model_dir": str(model_dir.absolute()), "rollout": dataclasses.asdict(config.rollout)}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if wants_help(words):
        print(HELP)
        return 0
    try:
        variables = begin(words)
    except (ValueError, OSError) as error:  # also a full disk, or one that may not be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    if variables["STATE"] == "exhausted":
        print(exhausted(Path(str(variables["RUN_DIR"])), os.environ["SLURM_JOB_ID"]), file=sys.stderr)
        return 3
    for name, value in variables.items():
        print(f"{name}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
