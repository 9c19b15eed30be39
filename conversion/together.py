"""Several processes that write one checkpoint: under srun, or with `--rank R --world W --attempt NAME`.

Rank 0 owns the private directory of `publish.published`. It opens it to the others, which write their share of the
units there and report; when all have reported, rank 0 publishes. They communicate only through files, on any shared
file system. The name of the attempt distinguishes it from an earlier, killed attempt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.publish import published, working_directory
from conversion.units import write_json

_MEETING = ".together"  # directory inside the private one, gone before it is published
_BEAT_S = 5.0


@dataclass(frozen=True, slots=True)
class Team:
    """This process's place among those of one attempt."""

    rank: int = 0
    world: int = 1
    attempt: str = "alone"
    patience_s: float = 600.0  # without any change, until a rank counts as lost

    @contextlib.contextmanager
    def directory(
        self,
        out: str | Path,
        prepare: Callable[[Path], object],
        *,
        overwrite: bool,
        sources: Iterable[str | Path],
        job: str,
        resume: bool,
    ) -> Iterator[tuple[Path, Callable[[int], None]]]:
        """The private directory to write into, and a callback to call with every block.

        Rank 0 makes it (as `publish.published`), calls `prepare` with it and publishes it when the block ends; for the
        others the end of the block means that their share is done.
        """
        if self.rank == 0:
            with published(out, overwrite, sources, job=job, resume=resume) as partial:
                prepare(partial)
                self.open(partial)
                yield partial, lambda count: None
        else:
            partial = self.join(out)
            with self.at_work(partial) as alive:
                yield partial, alive
                self.report(partial, {"done": True})

    def open(self, partial: Path) -> None:
        """Rank 0: let the others in."""
        if (partial / _MEETING).exists():
            shutil.rmtree(partial / _MEETING)  # of an attempt that this one continues
        (partial / _MEETING).mkdir()
        write_json(partial / _MEETING / "attempt.json", self._sign())

    def _sign(self) -> dict[str, Any]:
        return {"attempt": self.attempt, "world": self.world}

    def _is_open(self, partial: Path) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return bool(json.loads((partial / _MEETING / "attempt.json").read_text()) == self._sign())
        return False

    def join(self, out: str | Path) -> Path:
        """Any other rank: the directory that rank 0 has opened. ValueError when it does not within the patience."""
        partial, deadline = working_directory(out), time.monotonic() + self.patience_s
        while time.monotonic() < deadline:
            if self._is_open(partial):
                return partial
            time.sleep(0.1)
        raise ValueError(f"rank 0 did not begin with {out} within {self.patience_s:.0f} s: see its output")

    @contextlib.contextmanager
    def at_work(self, partial: Path) -> Iterator[Callable[[int], None]]:
        """Any other rank: gives a callback to call with every block; an error is reported to rank 0 and raised."""
        beat, last = partial / _MEETING / f"alive-{self.rank}", 0.0

        def alive(_: int) -> None:
            nonlocal last
            if time.monotonic() - last > _BEAT_S:
                last = time.monotonic()
                if not self._is_open(partial):
                    raise ValueError("rank 0 has given up, or another attempt has begun: see its output")
                beat.write_text(str(time.time_ns()))

        alive(0)
        try:
            yield alive
        except BaseException as error:
            with contextlib.suppress(OSError):  # rank 0 may be gone with the directory
                self.report(partial, {"error": str(error) or type(error).__name__})
            raise

    def report(self, partial: Path, content: dict[str, Any]) -> None:
        write_json(partial / _MEETING / f"rank-{self.rank}.json", content)

    def collect(self, partial: Path) -> None:
        """Rank 0: wait until the others have reported, and close the meeting. ValueError when one failed or is lost."""
        reports: dict[int, dict[str, Any]] = {}
        signs: dict[int, tuple[str, float]] = {}
        while len(reports) < self.world - 1:
            for rank in set(range(1, self.world)) - reports.keys():
                path = partial / _MEETING / f"rank-{rank}.json"
                if path.is_file():
                    reports[rank] = json.loads(path.read_text(encoding="utf-8"))
                    if "error" in reports[rank]:
                        raise ValueError(f"rank {rank}: {reports[rank]['error']}")
                    continue
                beat = partial / _MEETING / f"alive-{rank}"
                sign = beat.read_text() if beat.is_file() else ""
                if rank not in signs or signs[rank][0] != sign:
                    signs[rank] = sign, time.monotonic()
                elif time.monotonic() - signs[rank][1] > self.patience_s:
                    raise ValueError(f"rank {rank} has sent no heartbeat for {self.patience_s:.0f} s: start again")
            time.sleep(0.1)
        if (partial / _MEETING).exists():
            shutil.rmtree(partial / _MEETING)


ALONE = Team()


def add_team(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, help="of several processes that share the work (default: srun's)")
    parser.add_argument("--world", type=int, help="number of processes (default: srun's, else 1)")
    parser.add_argument(
        "--attempt", help="the same for all processes, new for every attempt (default: srun's job and step)"
    )


def team_of(args: argparse.Namespace) -> Team:
    """From the command line or from srun. ValueError for a place that does not exist."""
    environment = os.environ
    if args.world is None and int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in environment:
        keys = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        attempt = ".".join(environment.get(key, "0") for key in keys)
        return Team(int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"]), attempt)
    rank, world = args.rank or 0, args.world or 1
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"--rank {rank} --world {world}: the rank must be between 0 and {max(world, 1) - 1}")
    if world > 1 and not args.attempt:
        raise ValueError("--world needs --attempt NAME: the same for all ranks, and a new one for every attempt")
    return Team(rank, world, args.attempt) if world > 1 else ALONE
