"""Faults of the learner on a real Slurm are detected, reported and recovered from. Each row of the table is a job.

python -m pytest -m slow -s tests/e2e/slurm/test_drills.py

The first drill is also one of the jobs of test_jobs.py.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from drills import DRILLS, HERE, SHORT, Drill, submit, survived
from jobs import LOCAL, Site, steps

from recipes.cluster.attempt import attempts, events

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("drill", [pytest.param(drill, id=drill.name) for drill in DRILLS])
def test_a_fault_is_found_named_and_survived(drill: Drill, site: Site) -> None:
    survived(drill, submit(drill, site), site)


def test_a_batch_that_is_not_finite_is_not_requeued(site: Site) -> None:
    job = site.submit("nan", *SHORT, PROGRAM="faulty", FAULT="nan 0 4", PYTHONPATH=str(HERE))
    assert job.until_ended() == ("FAILED", "5"), job.printed()
    assert job.show("Restarts") == "0" and "step 5, update 1: not finite: gradient; samples " in job.printed()
    print("\n| gradient not finite | step, update and samples | at once | not requeued; weights as before |")


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


def test_a_server_that_gives_up_is_not_waited_for(site: Site) -> None:
    """A stub replaces vLLM's supervisor: one of two servers gives up, and the job continues with the other."""
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
