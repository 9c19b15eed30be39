"""Show the state of a run: `python -m recipes.status RUN_DIR`. Reads files only, on any machine with the directory."""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from recipes.cluster import attempt, flight
from recipes.cluster.attempt import Event
from recipes.cluster.blame import first_error
from recipes.cluster.lock import is_locked
from recipes.reporting.runs import changed_settings, is_number, read_config, read_jsonl

ALIVE_S = 60.0  # the batch script's heartbeat comes every second; file servers may show it late
RECENT = 10  # the median time of these last steps gives the estimate of the time left
SHOWN = {
    "reward": "critic/rewards/mean",
    "entropy": "actor/entropy",
    "grad norm": "actor/grad_norm",
    "length": "response_length/mean",
}


def state(run_dir: Path, now: float) -> tuple[str, str]:
    """(one of finished, running, queued, stopped, failed, refused, cancelled, lost, new; a few words more)."""
    all_attempts = attempt.attempts(run_dir)
    if attempt.finished_steps(run_dir):
        return "finished", ""
    if not all_attempts:
        return "new", "no attempt yet"
    events = attempt.events(all_attempts[-1])
    job = [event for event in events if event.role == "job"]
    if job and job[-1].name != "started":
        last = job[-1].name
        return ("queued", "requeued, waiting to continue") if last == "requeued" else (last, "")
    if job:
        try:
            silent = now - (all_attempts[-1] / "heartbeat").stat().st_mtime
        except OSError:
            silent = now - job[-1].time
        if silent < ALIVE_S:
            return "running", f"job {job[0].details.get('job')}"
        return "lost", f"no heartbeat for {_duration(silent)}: node lost, or requeued and waiting"
    if is_locked(run_dir):
        return "running", ""
    ends = [event for event in events if event.role == "learner" and event.name in ("started", "stopped", "failed")]
    if ends and ends[-1].name == "stopped":
        step, interrupted = ends[-1].details.get("step"), ends[-1].details.get("interrupted")
        at_once = f"at once, by Ctrl-C; the last checkpoint is of step {step}"
        return "stopped", at_once if interrupted else f"at step {step}"
    return ("failed", "") if ends and ends[-1].name == "failed" else ("lost", "ended without a final event: killed?")


def servers(events: Sequence[Event]) -> str:
    """How many servers are ready, how often they were started again."""
    last: dict[str, str] = {}
    failures = 0
    for event in events:
        if re.fullmatch(r"server-\d+", event.role):
            last[event.role] = event.name
            failures += event.name == "failed"
    if not last:
        return ""
    text = f"{sum(name == 'ready' for name in last.values())} of {len(last)} ready"
    return text + (f", {failures} restarts" if failures else "")


def describe(run_dir: Path, now: float | None = None) -> list[tuple[str, str]]:
    """(label, text) lines. Raises ValueError when the directory is not a run's."""
    now = time.time() if now is None else now
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such directory; give the run.dir of a run")
    metrics, config = run_dir / "metrics.jsonl", read_config(run_dir)
    rows = [row for row in (read_jsonl(metrics)[0] if metrics.is_file() else []) if is_number(row.get("step"))]
    all_attempts = attempt.attempts(run_dir)
    if not config and not all_attempts:
        raise ValueError(f"{run_dir} holds neither config.yaml nor logs: give the run.dir of a run")
    name, words = state(run_dir, now)
    out = [("state", name + (f" ({words})" if words else ""))]
    out += _progress(rows, config, name)
    out.append(("checkpoint", f"step {attempt.checkpoint_step(run_dir)}"))
    if all_attempts:
        events = attempt.events(all_attempts[-1])
        started = _when(events[0].time) if events else "just now"
        out.append(("attempt", f"{len(all_attempts)}, since {started}, {all_attempts[-1]}"))
        if name == "running" and (text := servers(events)):
            out.append(("servers", text))
    if changes := changed_settings(run_dir):
        out.append(("changes", "\n              ".join(changes)))
    if name not in ("finished", "running"):
        out += _error(all_attempts)
    return out


def _progress(rows: list[dict[str, Any]], config: dict[str, Any], name: str) -> list[tuple[str, str]]:
    train = config.get("train")
    steps = train.get("steps", "?") if isinstance(train, dict) else "?"
    if not rows:
        return [("step", f"0 of {steps}")]
    last = rows[-1]
    out = [("step", f"{last['step']} of {steps}")]
    values = [f"{label} {last[key]:.4g}" for label, key in SHOWN.items() if is_number(last.get(key))]
    out.append(("last step", ", ".join(values)))
    evaluations = [row for row in rows if any(key.startswith("val-core/") for key in row)]
    if evaluations:
        row = evaluations[-1]
        scores = [f"{key.removeprefix('val-core/')} {row[key]:.3f}" for key in sorted(row) if _is_score(key)]
        out.append(("evaluation", f"step {row['step']}: {', '.join(scores)}"))
    timed = [row["timing_s/step"] for row in rows[-RECENT:] if is_number(row.get("timing_s/step"))]
    seconds = statistics.median(timed) if timed else 0.0
    speed = f"{last.get('perf/throughput', 0):.0f} tokens/s, {seconds:.3g} s a step"
    if name == "running" and isinstance(steps, int):
        speed += f", {_duration((steps - last['step']) * seconds)} left"
    return [*out, ("speed", speed)]


def _is_score(key: str) -> bool:
    return key.startswith("val-core/") and not key.endswith(("/low", "/high", "/problems", "/truncated"))


def _error(all_attempts: list[Path]) -> list[tuple[str, str]]:
    for directory in reversed(all_attempts):
        if (error := first_error(directory)) is not None:
            where = f"{error.role} of {directory.name}, {_when(error.time)}: {error.what}"
            out = [("first error", "\n".join([where, *(f"  | {line[:200]}" for line in error.tail)]))]
            if found := flight.records(directory):
                out.append(("collectives", f"{', '.join(path.name for path in found)} in {found[0].parent}"))
            return out
    return []


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _duration(seconds: float) -> str:
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.status", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="run.dir of a run, also of one that is running or was killed")
    try:
        lines = describe(parser.parse_args(argv).run_dir)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False, soft_wrap=True)
    for label, text in lines:
        console.print(f"[dim]{label:>12}[/]  {escape(text)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
