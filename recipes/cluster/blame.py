"""The cause of a failed attempt, which is not always the first event.

When one of many ranks fails, all fail. The rank that runs out of memory reports it; its peers report "connection
closed"; Slurm then kills the rest; and a server that died and was replaced an hour earlier is unrelated. `cause` ranks
the events of an attempt accordingly. Clocks of nodes may differ by seconds, so the time of an event decides only
between events of the same kind.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.cluster import attempt
from recipes.cluster.attempt import Event
from recipes.cluster.heartbeat import DIRECTORY

TAIL = 8  # lines of a failed role's log
# Messages of a rank that has lost a peer. Other messages are its own errors.
PEER = re.compile(
    r"DistBackendError|DistNetworkError|DistStoreError|gloo|NCCL|ProcessGroup|TCPStore|remote process exited|collective"
    r"|[Cc]onnection (closed|reset|refused)|Broken pipe|Timed out (waiting|after)"
)
SERVERS = re.compile(r"rollout server|ServerError|WeightUpdateError")  # the learner could not go on without servers
CRASHED = (132, 134, 135, 136, 139)  # by its own fault (ILL, ABRT, BUS, FPE, SEGV), which Slurm does to no rank


@dataclass(frozen=True)
class FirstError:
    """The role that failed first, when (seconds since the epoch), how, and the end of its log."""

    role: str
    time: float
    what: str
    log: Path | None
    tail: list[str]


def first_error(directory: Path) -> FirstError | None:
    """The cause of an attempt's failure; None if nothing failed."""
    found = cause(attempt.events(directory), rank_nodes(directory))
    if found is None:
        return None
    role = rank_role(found.role)
    log = directory / f"{role}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    tail = [line.rstrip() for line in lines if line.strip()][-TAIL:]
    return FirstError(role, found.time, what(found), log if log.is_file() else None, tail)


def rank_nodes(directory: Path) -> dict[str, str]:
    """Node by role of every learner rank that has lived in an attempt, from the heartbeats."""
    found = {}
    for path in (directory / DIRECTORY).glob("rank*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found[f"learner-{path.stem}"] = str(json.loads(path.read_text(encoding="utf-8"))["node"])
    return found


def cause(events: Sequence[Event], nodes: Mapping[str, str]) -> Event | None:
    """The event that explains the others. ``nodes``: node of each learner rank. Pure."""
    failed = [event for event in events if what(event)]
    kinds = (
        [e for e in failed if e.details.get("hung")],
        [e for e in failed if e.role == "preflight"],
        _lost_learner(events, nodes),
        _own_errors(failed),
        [e for e in failed if e.role.startswith("learner")],
        _unrecovered(failed, events),
        [e for e in failed if not e.role.startswith("server-")],
    )
    found = next((kind[0] for kind in kinds if kind), None)
    if found is not None and found.role.startswith("learner") and SERVERS.search(what(found)):
        return next(iter(_unrecovered(failed, events)), found)
    return found


def what(event: Event) -> str:
    """How a role failed, in words; "" if it did not."""
    code = event.details.get("code", 0)
    if event.name in ("failed", "gave up") and "error" in event.details:
        return str(event.details["error"])
    if event.name == "ended" and code:
        return f"ended with status {code}" + (f" (signal {code - 128})" if code > 128 else "")
    return ""


def rank_role(role: str) -> str:
    return "learner-rank0" if role == "learner" else role


def _own_errors(failed: Sequence[Event]) -> list[Event]:
    """Order of ranks that did not merely lose a peer: those with an error message first, then crashed ones."""
    learner = [event for event in failed if event.role.startswith("learner")]
    noticed = {rank_role(event.role) for event in learner if PEER.search(what(event))}
    own = [event for event in learner if rank_role(event.role) not in noticed]
    return sorted(own, key=lambda e: ("error" not in e.details, e.details.get("code") not in CRASHED, e.time))


def _lost_learner(events: Sequence[Event], nodes: Mapping[str, str]) -> list[Event]:
    """The learner's node that Slurm found down at the end of the attempt."""
    found = []
    for event in events:
        lost = set(str(event.details.get("down", "")).split(",")) & set(nodes.values())
        if event.role == "nodes" and lost:
            ranks = sorted((role for role, node in nodes.items() if node in lost), key=lambda role: int(role[12:]))
            text = f"node {', '.join(sorted(lost))} was lost, with {', '.join(ranks)}"
            found.append(Event(event.time, ranks[0], "failed", {"error": text}))
    return found


def _unrecovered(failed: Sequence[Event], events: Sequence[Event]) -> list[Event]:
    """Failures of servers that have not been ready since."""
    ready = {event.role: event.time for event in events if event.name == "ready"}  # in order of time: the last
    return [e for e in failed if e.role.startswith("server-") and e.time > ready.get(e.role, 0.0)]
