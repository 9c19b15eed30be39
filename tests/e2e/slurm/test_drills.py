"""Faults of the learner on a real Slurm: found, named, and recovered from. A table; each row is a job of its own.

python -m pytest -m "slow or not slow" -s tests/e2e/slurm/test_drills.py
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from cluster import command_line
from jobs import Job, Site
from test_jobs import LOCAL, steps
from training import assert_same_run, run_here

from recipes.cluster import flight
from recipes.cluster.attempt import attempts, events
from recipes.cluster.blame import first_error

HERE = Path(__file__).parent
SHORT = (*LOCAL, "train.steps=12", "train.save_every=2", "run.hang_s=10", "run.collective_timeout_s=120")


@dataclass(frozen=True)
class Drill:
    """One fault and what must be said about it."""

    name: str
    cause: str  # pattern that the first error of the attempt matches
    words: tuple[str, ...] = ()
    nodes: str = "node1"
    fault: str = ""  # for faulty.py
    act: Callable[[Job], None] | None = None  # else, from outside, once some steps are done
    within_s: float = 60.0  # from the fault to the verdict
    excluded: str = ""  # the node that the next attempt does without
    slow: bool = True


def ranks(job: Job) -> dict[str, int]:
    """Process id by rank."""
    found = {}
    for process in job.processes("recipes.train") + job.processes("faulty"):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RANK" in process.environ() and "heartbeat" not in command_line(process):
                found[process.environ()["RANK"]] = process.pid
    return found


def send(number: str, rank: str) -> Callable[[Job], None]:
    import os
    import signal

    return lambda job: os.kill(ranks(job)[rank], getattr(signal, number))


TWO = ("parallel.tp=2",)
DRILLS = [
    Drill("single rank stopped", r"learner rank 0 is stopped or gone for \d+ s", act=send("SIGSTOP", "0"), slow=False),
    Drill(
        "stopped on any node", r"node1: learner rank 0 is stopped", act=send("SIGSTOP", "0"), nodes="", excluded="node1"
    ),
    Drill("rank 1 of 2 stopped", r"node2: learner rank 1 is stopped", TWO, "node1,node2", act=send("SIGSTOP", "1")),
    Drill("rank 0 of 2 stopped", r"node1: learner rank 0 is stopped", TWO, "node1,node2", act=send("SIGSTOP", "0")),
    Drill("rank 1 of 2 stuck", r"node2: learner rank 1 has made no progress", TWO, "node1,node2", "stuck 1 4"),
    Drill("rank 0 of 2 stuck", r"node1: learner rank 0 has made no progress", TWO, "node1,node2", "stuck 0 4"),
    Drill("single rank stuck", r"learner rank 0 has made no progress .* in update .*faulty.py", fault="stuck 0 4"),
    Drill("rank 1 of 2 out of memory", r"learner-rank1.*OutOfMemoryError", TWO, "node1,node2", "oom 1 4"),
    Drill("rank 0 of 2 fails", r"learner-rank0.*AssertionError: an invariant", TWO, "node1,node2", "assert 0 4"),
    Drill("rank 1 of 2 exits", r"learner-rank1.*ended with status 7", TWO, "node1,node2", "exit 1 4"),
    Drill("rank 1 of 2 killed", r"learner-rank1.*signal 9", TWO, "node1,node2", act=send("SIGKILL", "1")),
]


@pytest.mark.parametrize("drill", [pytest.param(d, marks=[pytest.mark.slow] * d.slow, id=d.name) for d in DRILLS])
def test_a_fault_is_found_named_and_survived(drill: Drill, site: Site) -> None:
    name = re.sub(r"\W+", "-", drill.name)
    program = {"PROGRAM": "faulty", "FAULT": drill.fault, "PYTHONPATH": str(HERE)} if drill.fault else {}
    job = site.submit(name, *SHORT, *drill.words, nodes=drill.nodes, **program)
    job.until("step 4", lambda: steps(job.run) >= 4)
    if drill.act is not None:
        drill.act(job)
    begin = time.monotonic()
    job.until("the attempt ends", lambda: any(e.role == "job" and e.name == "failed" for e in ended(job)))
    seconds = time.monotonic() - begin
    error = first_error(attempts(job.run)[0])
    assert error is not None and re.search(drill.cause, f"{error.role}: {error.what}"), f"{error}\n{job.printed()}"
    assert seconds < drill.within_s
    assert job.until_ended() == ("COMPLETED", "0"), job.printed()
    if drill.fault.startswith("stuck"):
        check_records(attempts(job.run)[0], int(drill.fault.split()[1]), job)
    assert job.show("ExcNodeList") == (drill.excluded or "(null)") and job.show("NodeList") != drill.excluded
    assert job.show("Restarts") == "1" and len(attempts(job.run)) == 2
    tail = [word for word in (*SHORT, *drill.words) if not word.startswith("parallel.")]
    if not drill.words:  # several ranks sum in another order
        assert_same_run(
            run_here(site.model, site.folder / f"{name}-replay", *tail, f"rollout.replay={job.run}"), job.run
        )
    print(f"\n| {drill.name} | {error.role}: {error.what[:110]} | {seconds:.1f} s | requeued, finished |")


def check_records(attempt: Path, stuck: int, job: Job) -> None:
    """What torch recorded of collectives is kept and named: what a rank waits in, and what NCCL would have written."""
    names = [path.name for path in flight.records(attempt)]
    assert f"rank{stuck}" in names and f"rank{stuck}.json" in names
    assert f"collectives  {', '.join(names)} in {attempt / flight.DIRECTORY}" in job.printed()
    for path in attempt.glob(f"{flight.DIRECTORY}/*.json"):
        entries = json.loads(path.read_text())["entries"]
        waits = [entry["profiling_name"] for entry in entries if not entry["retired"]]
        assert len(waits) == (path.name != f"rank{stuck}.json"), "the others wait in one"
        print(f"\n{path.name}: {len(entries)} collectives, waits in {waits}")


def ended(job: Job) -> list:  # type: ignore[type-arg]
    found = attempts(job.run)
    return events(found[0]) if found else []


@pytest.mark.slow
def test_a_batch_that_is_not_finite_is_not_requeued(site: Site) -> None:
    job = site.submit("nan", *SHORT, PROGRAM="faulty", FAULT="nan 0 4", PYTHONPATH=str(HERE))
    assert job.until_ended() == ("FAILED", "5"), job.printed()
    assert job.show("Restarts") == "0" and "step 5, update 1: not finite: gradient; samples " in job.printed()
    print("\n| gradient not finite | step, update and samples | at once | not requeued; weights as before |")


@pytest.mark.slow
def test_a_second_job_is_refused_and_touches_nothing(site: Site) -> None:
    job = site.submit("first", *LOCAL, "train.steps=100000")
    job.until("step 5", lambda: steps(job.run) >= 5)
    second = site.submit("first", *LOCAL, "train.steps=100000", options=(f"--output={job.out}.second",))
    assert second.until_ended() == ("FAILED", "2") and second.show("Restarts") == "0"
    said = Path(f"{job.out}.second").read_text()
    assert f"run.dir={job.run} is in use by " in said and f"lurm job {job.number}" in said, said
    assert len(attempts(job.run)) == 1 and (job.run / "logs/latest").resolve() == attempts(job.run)[0]
    site.cluster.ask("scancel", job.number)
    assert job.until_ended()[0] == "CANCELLED"


@pytest.mark.slow
def test_a_server_that_gives_up_is_not_waited_for(site: Site) -> None:
    """A stub in place of vLLM's supervisor: one of two serves, one gives up; the job goes on with the other."""
    stub = site.folder / "supervisor"
    stub.write_text(SUPERVISOR.format(python=(site.folder / "site.env").read_text().split()[0].partition("=")[2]))
    stub.chmod(0o755)
    env = site.folder / "supervised.env"
    env.write_text((site.folder / "site.env").read_text() + f"PYTHON={stub}\n")
    words = ("rollout.engine=vllm", "train.steps=1")
    split = {"LEARNER_NODES": "1", "ROLLOUT_NODES": "2", "SITE_ENV": str(env), "SERVER_START_S": "600"}
    begin = time.monotonic()
    job = site.submit("givesup", *LOCAL, *words, nodes="node1,node2,node3", **split)
    job.until("the learner's start", lambda: "going on with 1 of 2 servers" in job.printed(), 120)
    seconds = time.monotonic() - begin
    killed = [e for e in events(attempts(job.run)[0]) if "the supervisor ended by signal 9" in str(e.details)]
    assert [e.role for e in killed] == ["server-0"], "started again once"
    site.cluster.ask("scancel", job.number)
    assert job.until_ended()[0] == "CANCELLED"
    print(f"\n| server gives up while starting | going on with 1 of 2 | {seconds:.1f} s | without it |")
    print("| supervisor killed | server-0: the supervisor ended by signal 9 | 2 s | started again |")


SUPERVISOR = """#!/bin/bash
case "$*" in
	*"-m recipes.cluster.serve "*)
		[[ $SLURM_PROCID == 0 ]] || exit 1
		[[ -e $ATTEMPT_DIR/once ]] || {{ touch "$ATTEMPT_DIR/once"; kill -9 $$; }}
		echo "http://$SLURMD_NODENAME:1" >"$ATTEMPT_DIR/server-0.url"
		trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done ;;
	*) exec {python} "$@" ;;
esac
"""
