"""Jobs of slurm/smoke_cpu.sbatch on a real Slurm: killed, signalled, requeued, refused. The local engine generates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from drills import DRILLS, survived
from drills import submit as submit_drill
from jobs import LOCAL, LONG, Job, Site, steps
from training import assert_same_run, run_here

from recipes.cluster.attempt import attempts, checkpoint_step, events
from recipes.cluster.blame import first_error

# An interactive job sets these in the environment of jobs submitted from inside it.
OUTER_JOB = {
    **{"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node9", "SLURM_NNODES": "7", "SLURM_STEP_ID": "0"},
    **{"SLURM_CPU_BIND": "quiet,map_cpu:999", "SLURM_CPU_BIND_TYPE": "map_cpu:", "SLURM_CPU_BIND_LIST": "999"},
    **{"SLURM_MEM_PER_CPU": "64000", "SLURM_MEM_PER_GPU": "64000", "SLURM_GPUS_PER_NODE": "3", "SLURM_GRES": "gpu:3"},
    **{"SLURM_NTASKS_PER_NODE": "9", "SLURM_CPUS_PER_GPU": "9", "SLURM_TRES_PER_TASK": "cpu:9", "SLURM_HET_SIZE": "2"},
    **{"SLURM_DISTRIBUTION": "arbitrary", "SLURM_EXPORT_ENV": "NONE", "SLURM_STDOUTMODE": "/dev/null"},
}


@pytest.fixture(scope="module")
def jobs(site: Site) -> Iterator[dict[str, Job]]:
    """All jobs, submitted at once on three nodes, so that one waits while another computes."""
    hidden = site.folder / "hidden"
    hidden.mkdir()
    site.cluster.inside("node3", "mount", "-t", "tmpfs", "none", str(hidden))
    small = site.folder / "small"
    small.mkdir()
    site.cluster.inside("node2", "mount", "-t", "tmpfs", "-o", "size=4m", "none", str(small))
    yield {
        "long": site.submit("long", *LONG, options=("--job-name=chain",)),
        "next": site.submit(
            "long", *LONG, options=("--job-name=chain", "--dependency=singleton", "--output=/dev/null")
        ),
        "beside": site.submit("beside", *LOCAL, "train.steps=2", **OUTER_JOB),
        "typo": site.submit("typo", "optim.lrr=1"),
        "crashing": site.submit("crashing", *LOCAL, nodes="node2", PROGRAM="no.such.module", MAX_REQUEUES="1"),
        "hidden": site.submit("hidden/run", *LOCAL, nodes="node2,node3"),
        "small": site.submit("small/run", *LOCAL, nodes="node2"),
        "stopped": submit_drill(DRILLS[0], site),
    }
    site.cluster.inside("node3", "umount", str(hidden))
    site.cluster.inside("node2", "umount", str(small))


def test_user_errors_are_not_requeued(jobs: dict[str, Job]) -> None:
    job = jobs["typo"]
    assert job.until_ended() == ("FAILED", "2")
    assert "error: optim.lrr=1: there is no key 'optim.lrr'" in job.printed() and job.show("Restarts") == "0"


def test_a_run_survives_a_kill_and_the_time_limit(jobs: dict[str, Job], site: Site) -> None:
    """Killed, requeued, stopped by the time limit's signal, requeued, finished: equal to an uninterrupted run."""
    job = jobs["long"]
    job.until("step 3", lambda: steps(job.run) >= 3)
    job.ranks()["0"].kill()
    seconds = job.until_state("PENDING", "COMPLETING")
    back = job.until("the next attempt", lambda: len(attempts(job.run)) == 2)
    print(f"learner killed: job step ended and requeued after {seconds:.1f} s, new attempt {back:.1f} s later")
    assert seconds < 60
    error = first_error(attempts(job.run)[0])
    assert error is not None and error.role == "learner-rank0" and error.what == "ended with status 137 (signal 9)"

    job.until("step 8", lambda: steps(job.run) >= 8 and len(events(attempts(job.run)[1])) > 1)
    job.cluster.ask("scancel", "--batch", "--signal=USR1", job.number)
    at = steps(job.run)
    seconds = job.until("stopped", lambda: any(e.name == "stopped" for e in events(attempts(job.run)[1])))
    stopped = next(e for e in events(attempts(job.run)[1]) if e.name == "stopped").details["step"]
    assert stopped == checkpoint_step(job.run) <= at + 2, "the next step boundary"
    print(f"time limit's signal: checkpoint after {seconds:.1f} s")
    assert job.until_ended() == ("COMPLETED", "0"), job.printed()
    assert len(attempts(job.run)) == 3 and job.show("Restarts") == "2"
    log = (attempts(job.run)[2] / "learner-rank0.log").read_text()
    assert f"after step {stopped}" in log, "nothing was done twice"

    replay = run_here(site.model, site.folder / "replay", *LONG, f"rollout.replay={job.run}")
    assert_same_run(replay, job.run)


def test_a_finished_run_ends_the_chain_at_once(jobs: dict[str, Job]) -> None:
    job = jobs["next"]
    assert job.until_ended() == ("COMPLETED", "0")
    assert len(attempts(job.run)) == 3, "no further attempt"


def test_two_jobs_share_a_node(jobs: dict[str, Job]) -> None:
    """The second job was submitted from inside a third, whose SLURM_* variables it must not use."""
    job, other = jobs["beside"], jobs["long"]
    assert job.until_ended() == ("COMPLETED", "0") and steps(job.run) == 2
    mine, first = events(attempts(job.run)[0]), events(attempts(other.run)[0])
    assert mine[0].details["nodes"] == first[0].details["nodes"] == "node1"
    assert max(mine[0].time, first[0].time) < min(mine[-1].time, first[-1].time), "at the same time"


def test_requeueing_without_progress_ends(jobs: dict[str, Job]) -> None:
    job = jobs["crashing"]
    assert job.until_ended() == ("FAILED", "1")
    assert job.show("Restarts") == "1" and len(attempts(job.run)) == 2
    assert "2 attempts in a row ended without a newer checkpoint: not requeued" in job.printed()
    assert "No module named 'no'" in job.printed(), "the first error is shown"


def test_a_node_without_the_shared_directory_is_refused(jobs: dict[str, Job]) -> None:
    job = jobs["hidden"]
    assert job.until_ended() == ("FAILED", "3") and job.show("Restarts") == "0"
    assert "error: node3: does not see the run directory (No such file or directory)" in job.printed()


def test_a_full_disk_is_refused(jobs: dict[str, Job]) -> None:
    job = jobs["small"]
    assert job.until_ended() == ("FAILED", "3")
    assert "error: node2: 0.0 GiB free for the run directory, 1 needed" in job.printed()


def test_a_stopped_rank_is_found_named_and_survived(jobs: dict[str, Job], site: Site) -> None:
    survived(DRILLS[0], jobs["stopped"], site)


def test_no_process_is_left(jobs: dict[str, Job], site: Site) -> None:
    for job in jobs.values():
        job.until_ended()
    for node in ("node1", "node2", "node3"):
        jobs["long"].until(f"{node} is empty", lambda node=node: not site.cluster.processes(node), 30)  # type: ignore[misc]
