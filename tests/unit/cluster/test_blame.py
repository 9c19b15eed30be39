"""The first error names the cause: sequences of events as recorded after faults, in order of time."""

from __future__ import annotations

import pytest

from recipes.cluster.attempt import Event
from recipes.cluster.blame import cause, rank_role, what

NODES = {"learner-rank0": "n1", "learner-rank1": "n1", "learner-rank2": "n2", "learner-rank3": "n2"}
LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.1.0.2]:31337"
NCCL = "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2356, remote process exited or there was a network error"
OOM = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB"
NO_SERVER = "ServerError: no usable rollout server came back within 300 s (rollout.revive_timeout_s)"


def failed(role: str, error: str, **details: object) -> tuple[str, str, dict[str, object]]:
    return role, "failed", {"error": error, **details}


def ended(role: str, code: int) -> tuple[str, str, dict[str, object]]:
    return role, "ended", {"code": code}


def ready(role: str) -> tuple[str, str, dict[str, object]]:
    return role, "ready", {}


DIED = failed("server-0", "ended by signal 9")
CASES = {
    "a server died and was replaced, then the learner ran out of memory": (
        [ready("server-0"), DIED, ready("server-0"), failed("learner", OOM), ended("learner-rank0", 1)],
        ("learner-rank0", OOM),
    ),
    "a server died for good, the run went on with the others, then the learner ran out of memory": (
        [ready("server-0"), DIED, failed("learner", OOM), ended("learner-rank0", 1)],
        ("learner-rank0", OOM),
    ),
    "all servers are gone": (
        [
            DIED,
            ready("server-0"),
            failed("server-1", "the engine did not answer for 300 s"),
            DIED,
            failed("learner", NO_SERVER),
        ],
        ("server-1", "the engine did not answer for 300 s"),
    ),
    "a rank runs out of memory, its peers lose it first by their clocks": (
        [
            failed("learner", LOST),
            failed("learner-rank1", NCCL),
            failed("learner-rank2", OOM),
            ended("learner-rank2", 1),
        ],
        ("learner-rank2", OOM),
    ),
    "a rank is killed, rank 0 notices, Slurm kills the rest": (
        [ended("learner-rank3", 137), failed("learner", LOST), ended("learner-rank0", 1), ended("learner-rank1", 143)],
        ("learner-rank3", "ended with status 137 (signal 9)"),
    ),
    "a rank ends by itself, all others are killed, one of them before it by a clock that is behind": (
        [ended("learner-rank0", 137), ended("learner-rank2", 139), ended("learner-rank1", 137)],
        ("learner-rank2", "ended with status 139 (signal 11)"),
    ),
    "a rank hangs and the others are killed": (
        [
            failed("learner-rank2", "n2: learner rank 2 is stopped", hung=True),
            failed("learner", LOST),
            ended("learner-rank1", 137),
        ],
        ("learner-rank2", "n2: learner rank 2 is stopped"),
    ),
    "a learner's node is lost": (
        [
            failed("learner", LOST),
            ended("learner-rank0", 1),
            ended("learner-rank1", 137),
            ("nodes", "lost", {"down": "n2"}),
        ],
        ("learner-rank2", "node n2 was lost, with learner-rank2, learner-rank3"),
    ),
    "a servers' node was lost an hour ago, then an assertion fails": (
        [
            DIED,
            failed("learner-rank1", "AssertionError: x"),
            ended("learner-rank1", 1),
            ("nodes", "lost", {"down": "n9"}),
        ],
        ("learner-rank1", "AssertionError: x"),
    ),
    "only peers speak: the first of them": (
        [failed("learner-rank1", NCCL), failed("learner", LOST)],
        ("learner-rank1", NCCL),
    ),
    "the servers never came up": (
        [
            failed("server-1", "ended with status 1 while starting"),
            failed("server-0", "ended with status 1 while starting"),
        ],
        ("server-1", "ended with status 1 while starting"),
    ),
    "preflight refused": (
        [failed("preflight", "n2: 7 GPUs, 8 needed")],
        ("preflight", "n2: 7 GPUs, 8 needed"),
    ),
    "a module that does not exist": ([ended("learner-rank0", 1)], ("learner-rank0", "ended with status 1")),
    "nothing failed": ([ready("server-0"), DIED, ready("server-0"), ended("learner-rank0", 0)], None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_named(name: str) -> None:
    sequence, expected = CASES[name]
    events = [Event(1000.0 + i, role, event, details) for i, (role, event, details) in enumerate(sequence)]
    found = cause(events, NODES)
    assert (found and (rank_role(found.role), what(found))) == expected
