"""Drills: one fault each, the expected error message, and the job's recovery."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs import LOCAL, ROOT, Job, Site, steps
from training import arguments, assert_same_run, run_here

from recipes.cluster import flight
from recipes.cluster.attempt import attempts, events
from recipes.cluster.blame import first_error

HERE = Path(__file__).parent
SHORT = (*LOCAL, "train.steps=12", "train.save_every=2", "run.hang_s=10", "run.collective_timeout_s=120")


@dataclass(frozen=True)
class Drill:
    """One fault and the expected error message."""

    name: str
    cause: str  # pattern that the first error of the attempt matches
    words: tuple[str, ...] = ()
    nodes: str = "node1"
    fault: str = ""  # for faulty.py
    act: Callable[[Job], None] | None = None  # otherwise injected from outside, after some steps
    within_s: float = 60.0  # from the fault to the reported error
    excluded: str = ""  # the node that the next attempt excludes

    @property
    def run(self) -> str:
        return re.sub(r"\W+", "-", self.name)


def send(number: str, rank: str) -> Callable[[Job], None]:
    return lambda job: job.ranks()[rank].send_signal(getattr(signal, number))


TWO = ("parallel.tp=2",)
DRILLS = [
    Drill("single rank stopped", r"learner rank 0 is stopped or gone for \d+ s", fault="stop 0 4"),
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


def submit(drill: Drill, site: Site) -> Job:
    program = {"PROGRAM": "faulty", "FAULT": drill.fault, "PYTHONPATH": str(HERE)} if drill.fault else {}
    return site.submit(drill.run, *SHORT, *drill.words, nodes=drill.nodes, **program)


def survived(drill: Drill, job: Job, site: Site) -> None:
    """Inject the fault, check that the attempt fails with the right cause, and that the job finishes correctly."""
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
    replay = site.folder / f"{drill.run}-replay"
    words = (*SHORT, *drill.words, f"rollout.replay={job.run}")
    if drill.words:  # in the same layout, since the order of sums depends on the number of ranks
        command = [sys.executable, "-m", "recipes.train", *arguments(site.model, replay, *words)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    else:
        run_here(site.model, replay, *words)
    assert_same_run(replay, job.run)
    print(f"\n| {drill.name} | {error.role}: {error.what[:110]} | {seconds:.1f} s | requeued, finished | equal |")


def check_records(attempt: Path, stuck: int, job: Job) -> None:
    """torch's records of collectives are kept: the collective in which a rank waits, and NCCL's watchdog record."""
    names = [path.name for path in flight.records(attempt)]
    assert f"rank{stuck}" in names and f"rank{stuck}.json" in names
    assert f"collectives  {', '.join(names)} in {attempt / flight.DIRECTORY}" in job.printed()
    for path in attempt.glob(f"{flight.DIRECTORY}/*.json"):
        entries = json.loads(path.read_text())["entries"]
        waits = [entry["profiling_name"] for entry in entries if not entry["retired"]]
        assert waits or path.name == f"rank{stuck}.json", "what another rank waits in"
        print(f"\n{path.name}: {len(entries)} collectives, waits in {waits}")


def ended(job: Job) -> list:  # type: ignore[type-arg]
    found = attempts(job.run)
    return events(found[0]) if found else []
