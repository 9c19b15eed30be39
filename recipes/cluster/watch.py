"""Detect a hung learner and name the rank: `python -m recipes.cluster.watch ATTEMPT --ranks N`, beside the job.

It reads the ranks' heartbeats (`recipes.cluster.heartbeat`) until it is killed, or until one rank is stopped, sends no
heartbeat, or makes no progress for too long. Then it prints rank, node, phase and duration, records that as the
attempt's first error, writes the node to `ATTEMPT/hung_nodes`, and ends with status 4.
Outside a batch job the heartbeat of rank 0 does the same (`Guard`) and ends the ranks of its host.

Ages are measured by this process's clock, or by one rank's own: clocks of different nodes are never compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.cluster import attempt
from recipes.cluster.heartbeat import DIRECTORY, LIMITS, node_name, process

HUNG_NODES = "hung_nodes"
POLL_S = 2.0
END = "end"  # phase of a rank whose work is done
STATUS = 4


@dataclass(frozen=True)
class Rank:
    """The state of one rank from its heartbeat, and how long its heartbeat or its process has not changed."""

    rank: int
    node: str
    phase: str
    operation: str = ""
    step: int = 0
    phases: int = 0  # how many it has entered: the same sequence on every rank
    age_s: float = 0.0  # since it last got anything done
    limit_s: float | None = None  # of its phase
    where: str = ""
    silent_s: float = 0.0  # without a new heartbeat
    stopped_s: float = 0.0  # its process is stopped or gone

    def describe(self) -> str:
        step = f" of step {self.step + 1}" if self.step or self.phase not in LIMITS else ""
        doing = f"in {self.phase}{step}" + (f", {self.operation}" if self.operation else "")
        where = f", {self.where}" if self.where else ""
        if self.silent_s and self.silent_s >= self.age_s:
            return f"{self.node}: learner rank {self.rank} has sent no heartbeat for {self.silent_s:.0f} s ({doing})"
        if self.stopped_s:
            return f"{self.node}: learner rank {self.rank} is stopped or gone for {self.stopped_s:.0f} s ({doing})"
        return f"{self.node}: learner rank {self.rank} has made no progress for {self.age_s:.0f} s ({doing}{where})"


def alarm_s(limit_s: float) -> float:
    """Limit that reports a hang within ``limit_s``: a heartbeat and this loop take some seconds."""
    return limit_s - min(10.0, limit_s / 5)


def culprits(ranks: Sequence[Rank], hang_s: float) -> list[Rank]:
    """The ranks that block all others, most likely first; empty while the learner makes progress. Pure."""
    alive = [rank for rank in ranks if rank.phase != END]
    direct = [r for r in alive if max(r.silent_s, r.stopped_s) > alarm_s(hang_s)]
    if direct:
        return sorted(direct, key=lambda r: -max(r.silent_s, r.stopped_s))
    stuck = [r for r in alive if r.limit_s is not None and r.age_s + r.silent_s > alarm_s(r.limit_s)]
    if not stuck:
        return []
    shortest = min(r.limit_s for r in stuck if r.limit_s is not None)
    # Ranks that still make progress in such a phase are waited for; ranks in a longer one wait for a stuck rank.
    if any(r not in stuck and r.limit_s is not None and r.limit_s <= shortest for r in alive):
        return []
    # Whoever waits in a collective waits for a peer. Among the rest the one that is behind, then that came to rest
    # first.
    stuck.sort(key=lambda r: (r.where.startswith("waits"), r.phases, -(r.age_s + r.silent_s)))
    first = stuck[0]
    place = (first.where.startswith("waits"), first.phases)
    same = [r for r in stuck if (r.where.startswith("waits"), r.phases) == place]
    return [r for r in same if first.age_s + first.silent_s - r.age_s - r.silent_s < 2 * POLL_S]


def sentence(found: Sequence[Rank], total: int) -> str:
    """The result of `culprits` as a sentence."""
    more = f"; likewise rank {', '.join(str(r.rank) for r in found[1:5])}" if found[1:] else ""
    more += " and others" if found[5:] else ""
    waiting = total - len(found)
    return found[0].describe() + more + (f"; the other {waiting} wait" if waiting else "")


class Watch:
    """The heartbeats of one attempt over time."""

    def __init__(self, directory: Path, ranks: int) -> None:
        self._directory, self._ranks = directory / DIRECTORY, ranks
        self._beats: dict[int, tuple[int, float]] = {}  # rank: its newest beat, when that was first seen
        self._stopped: dict[int, float] = {}
        self._last: dict[int, Mapping[str, Any]] = {}
        self._began = self._now = 0.0

    def look(self, elapsed_s: float) -> list[Rank]:
        """All ranks that have shown themselves. ``elapsed_s`` since the last look, without what this process slept
        through: when the file system stands still, nobody else's silence counts."""
        self._now += elapsed_s
        for rank in range(self._ranks):
            with contextlib.suppress(OSError, ValueError):
                self._last[rank] = json.loads((self._directory / f"rank{rank}.json").read_text())
        return [self._rank(number, beat) for number, beat in sorted(self._last.items())]

    @property
    def beats(self) -> list[Mapping[str, Any]]:
        """The newest heartbeat of every rank that has shown itself."""
        return list(self._last.values())

    def missing(self) -> list[int]:
        return [rank for rank in range(self._ranks) if rank not in self._last]

    def _rank(self, number: int, beat: Mapping[str, Any]) -> Rank:
        seen = self._beats.get(number)
        if seen is None or seen[0] != beat["beat"]:
            self._beats[number] = seen = (beat["beat"], self._now)
        if beat["state"] in ("T", "t", "Z", ""):
            self._stopped.setdefault(number, self._now)
        else:
            self._stopped.pop(number, None)
        return Rank(
            number,
            beat["node"],
            beat["phase"],
            beat["operation"],
            beat["step"],
            beat["phases"],
            beat["age"],
            beat["limit"],
            beat["where"],
            silent_s=self._now - seen[1],
            stopped_s=self._now - self._stopped[number] if number in self._stopped else 0.0,
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.cluster.watch", description=__doc__)
    parser.add_argument("attempt", type=Path, help="the attempt's directory")
    parser.add_argument("--ranks", type=int, required=True, help="of the learner, on all nodes")
    parser.add_argument(
        "--parent", type=int, default=os.getppid(), help="end when this process is no longer our parent"
    )
    arguments = parser.parse_args(argv)
    watch, started = Watch(arguments.attempt, arguments.ranks), time.monotonic()
    elapsed = 0.0
    while os.getppid() == arguments.parent:
        begin = time.monotonic()
        ranks = watch.look(elapsed)
        # Longer reads are delays of the file system.
        elapsed = POLL_S + min(time.monotonic() - begin, 1.0)
        found = culprits(ranks, hang_limit(arguments.attempt))
        late = watch.missing() if time.monotonic() - started > alarm_s(LIMITS["start"] or 0.0) else []
        if found or (late and ranks):
            print(f"[watch] hung: {accuse(arguments.attempt, found, late, arguments.ranks)}", flush=True)
            return STATUS
        time.sleep(POLL_S)
    return 0


def accuse(directory: Path, found: Sequence[Rank], late: Sequence[int], total: int) -> str:
    """Record who hangs, as the attempt's first error; the sentence."""
    what = sentence(found, total) if found else f"learner rank {late[0]} has never started"
    role = f"learner-rank{found[0].rank if found else late[0]}"
    attempt.record(directory, role, "failed", error=what, hung=True)
    nodes = sorted({rank.node for rank in found})
    with contextlib.suppress(OSError):  # a full disk: the sentence is still printed
        (directory / HUNG_NODES).write_text("\n".join(nodes) + "\n", encoding="utf-8")
    return what


class Guard:
    """Ends a hung run outside Slurm: started by hand, by `make train` or by torchrun.

    It lives in the heartbeat process of rank 0. The ranks of this host are killed, whereupon torchrun ends the others
    and itself with a status that is not 0. A run that its user has stopped with Ctrl-Z is left alone.
    """

    def __init__(self, directory: Path, ranks: int) -> None:
        self._directory, self._total = directory, ranks
        self._watch = Watch(directory, ranks)
        self._last = self._began = time.monotonic()

    def look(self, interval_s: float) -> None:
        """Called about every ``interval_s``."""
        now = time.monotonic()
        ranks = self._watch.look(min(now - self._last, interval_s + 1.0))
        self._last = now
        found = culprits(ranks, hang_limit(self._directory))
        late = self._watch.missing() if now - self._began > alarm_s(LIMITS["start"] or 0.0) else []
        if (not found and not late) or self._suspended(ranks):
            return
        what = accuse(self._directory, found, late, self._total)
        stacks = f"stacks in {self._directory / DIRECTORY}"
        print(
            f"error: hung: {what}. The run ends ({stacks}); the same command continues it", file=sys.stderr, flush=True
        )
        here = node_name()
        for beat in self._watch.beats:
            if beat["node"] == here and process(beat["pid"]).born == beat["born"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat["pid"], signal.SIGKILL)  # a stopped process reacts to no other signal

    def _suspended(self, ranks: Sequence[Rank]) -> bool:
        alive = [rank for rank in ranks if rank.phase != END]
        return all(rank.stopped_s for rank in alive) and any(beat["terminal"] for beat in self._watch.beats)


def hang_limit(directory: Path) -> float:
    """``run.hang_s`` of the attempt, from the ranks' heartbeats; a large value before the first."""
    for file in (directory / DIRECTORY).glob("rank*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return float(json.loads(file.read_text())["hang_s"])
    return 600.0


if __name__ == "__main__":
    sys.exit(main())
