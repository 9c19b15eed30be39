"""What a run directory holds, read for people: metrics, samples, configuration. All of it may be torn or hostile."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipes.cluster import attempt

Series = dict[str, list[tuple[float, float]]]


@dataclass
class Run:
    """What one run directory holds. ``series`` maps a metric to its (step, value) pairs, finite values only."""

    name: str
    series: Series
    config: dict[str, Any]
    samples: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    engine: str = ""  # that generated the rollouts, as it said itself

    def values(self, key: str) -> list[float]:
        return [value for _, value in self.series.get(key, [])]

    def steps(self) -> int:
        """Training steps done; the evaluation before the first step is not one."""
        return len({step for key, pairs in self.series.items() if not key.startswith("val-core/") for step, _ in pairs})


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The objects of a JSON-lines file, and a note when its last line is torn.

    A process killed while writing leaves half a line at the end; anywhere else a broken line is an error.

    Raises:
        ValueError: a line before the last is not a JSON object.
    """
    rows: list[dict[str, Any]] = []
    lines = [(i, line) for i, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == lines[-1][0]:
                return rows, f"The last line of {path.name} is incomplete and was left out."
            raise ValueError(f"{path.name} line {number} is not JSON: remove it or restore the file") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path.name} line {number} is not a JSON object: remove it or restore the file")
        rows.append(row)
    return rows, None


def series_of(rows: Iterable[dict[str, Any]]) -> Series:
    """Metric -> sorted (step, value). A step that occurs twice (a resumed run) keeps its later values.

    ``val-before/*`` is an evaluation with the weights that the row's step started from: one step earlier.
    """
    table: dict[str, dict[float, float]] = {}
    for row in rows:
        for key, value in row.items():
            if key == "step" or not is_number(value):
                continue
            step = float(row["step"])
            if key.startswith("val-before/"):
                key, step = key.replace("val-before/", "val-core/", 1), step - 1
            table.setdefault(key, {})[step] = float(value)
    return {key: sorted(pairs.items()) for key, pairs in table.items()} | _predicted(table)


def _predicted(table: Mapping[str, Mapping[float, float]]) -> Series:
    """First-order prediction of a step's entropy change: slope x learning rate x updates (see recipes.theory)."""
    slope, rate, updates = (table.get(key, {}) for key in ("theory/entropy_slope", "actor/lr", "actor/updates"))
    steps = sorted(slope.keys() & rate.keys() & updates.keys())
    found = [(step, slope[step] * rate[step] * updates[step]) for step in steps]
    return {"theory/entropy_change_predicted": found} if found else {}


def axes_of(series: Series) -> dict[str, list[float]]:
    """Of every step: its number, and the response tokens and hours from the start of the run to its end."""
    steps = sorted({step for pairs in series.values() for step, _ in pairs})
    length, count = dict(series.get("response_length/mean", [])), dict(series.get("rollout/samples", []))
    seconds, extra = dict(series.get("timing_s/step", [])), dict(series.get("timing_s/eval", []))
    tokens, hours = 0.0, 0.0
    out: dict[str, list[float]] = {"step": steps, "tokens": [], "hours": []}
    for step in steps:
        tokens += length.get(step, 0.0) * count.get(step, 0.0)
        hours += (seconds.get(step, 0.0) + extra.get(step, 0.0)) / 3600
        out["tokens"].append(tokens)
        out["hours"].append(hours)
    return {name: values for name, values in out.items() if name == "step" or values[-1:] > [0.0]}


def is_number(value: Any) -> bool:
    """A finite number that a chart can show; JSON's integers have no limit."""
    return isinstance(value, (int, float)) and abs(value) < 1e300  # False for NaN


def read_config(run_dir: Path) -> dict[str, Any]:
    """The run's configuration as it stands in its file; empty when there is none.

    Raises:
        ValueError: the file is not YAML, or not a mapping.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: restore it, or remove it to report without it") from error
    if not isinstance(content or {}, dict):
        raise ValueError(f"{file} is not a configuration: restore it, or remove it to report without it")
    return content or {}


def changed_settings(run_dir: Path) -> list[str]:
    """What later starts of the run changed, a line for each, as in "attempt 2, after step 40: optim.lr 1e-4 → 1e-5"."""
    found = []
    for directory in attempt.attempts(run_dir):
        events = attempt.events(directory)
        after = next((e.details.get("step") for e in events if e.name == "started" and e.role == "learner"), None)
        for event in events:
            changes = event.details.get("changes")
            if event.name == "changed" and isinstance(changes, dict):
                pairs = [(key, pair) for key, pair in changes.items() if isinstance(pair, list) and len(pair) == 2]
                text = ", ".join(f"{key} {before} → {now}" for key, (before, now) in pairs)
                where = "" if after is None else f", after step {after}"
                found.append(f"{directory.name.replace('_', ' ')}{where}: {text}")
    return found


def engine_of(run_dir: Path) -> str:
    """The rollout engine that really ran, of the last start that used one."""
    events = [e for a in attempt.attempts(run_dir) for e in attempt.events(a) if e.name == "engine"]
    return str(events[-1].details.get("engine", "")) if events else ""


def resumed_after(run_dir: Path) -> list[int]:
    """Steps after which later starts of the run continued."""
    starts = [e for a in attempt.attempts(run_dir) for e in attempt.events(a) if e.name == "started"]
    return [e.details["step"] for e in starts if e.role == "learner" and e.details.get("step")]


def load_run(run_dir: Path) -> Run:
    """Read a run directory. Only ``metrics.jsonl`` must exist.

    Raises:
        ValueError: no such directory, no metrics in it, or a metrics file broken before its end.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{run_dir} holds no metrics.jsonl: give the run.dir of a run")
    rows, note = read_jsonl(metrics)
    rows = [row for row in rows if is_number(row.get("step"))]
    if not rows:
        raise ValueError(f"{metrics} holds no complete step yet: wait for the first one")
    notes = [note] if note else []
    samples: list[dict[str, Any]] = []
    if (run_dir / "samples.jsonl").is_file():
        samples, note = read_jsonl(run_dir / "samples.jsonl")
        notes += [note] if note else []
    if resumed := resumed_after(run_dir):
        notes.append(f"Interrupted, and continued after step {', '.join(map(str, resumed))}.")
    notes += [f"Settings changed in {line}" for line in changed_settings(run_dir)]
    samples = [row for row in samples if is_number(row.get("step"))]
    return Run(run_dir.resolve().name, series_of(rows), read_config(run_dir), samples, notes, engine_of(run_dir))
