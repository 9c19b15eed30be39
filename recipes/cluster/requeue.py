"""Whether a job may be requeued again: `python -m recipes.cluster.requeue RUN_DIR` exits with 0, or 3 and the reason.

Standard library only, because it runs between two attempts while nodes wait.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.cluster import attempt

MAX_REQUEUES = 3  # in a row without a newer checkpoint; the environment variable of that name overrules


def idle_attempts(run_dir: Path, job: str) -> int:
    """How many attempts of this job, counted back from the newest, began with the checkpoint that is still newest."""
    now, count = attempt.checkpoint_step(run_dir), 0
    for directory in reversed(attempt.attempts(run_dir)):
        starts = [e for e in attempt.events(directory) if e.role == "job" and e.name == "started"]
        if not starts or starts[0].details.get("job") != job or starts[0].details.get("step") != now:
            break
        count += 1
    return count


def may_start(run_dir: Path, job: str) -> bool:
    """Whether one more attempt is allowed: the first, and MAX_REQUEUES more for each checkpoint."""
    return idle_attempts(run_dir, job) <= int(os.environ.get("MAX_REQUEUES", MAX_REQUEUES))


def exhausted(run_dir: Path, job: str) -> str:
    return (
        f"{idle_attempts(run_dir, job)} attempts in a row ended without a newer checkpoint: not requeued. "
        f"`python -m recipes.status {run_dir}` shows the first error; MAX_REQUEUES allows more"
    )


HELP = """usage: python -m recipes.cluster.requeue RUN_DIR

May this job be requeued once more? slurm/lib.sh asks it between two attempts. It may, unless the job's last attempts
ended without a newer checkpoint; the environment variable MAX_REQUEUES says how many of those are allowed.

Exit status: 0 for yes; 3 for no, with the reason. Needs SLURM_JOB_ID."""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) != 1 or words[0] in ("-h", "--help"):
        print(HELP)
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    run_dir = Path(words[0])
    job = os.environ["SLURM_JOB_ID"]
    if may_start(run_dir, job):
        return 0
    print(exhausted(run_dir, job), file=sys.stderr)
    return 3


if __name__ == "__main__":
    sys.exit(main())
