"""The results files of a study: one line per run, and one line of mean curves per block of seeds.

``benchmarks/results/studies/<study>.jsonl`` has one JSON object per run. ``curves/<study>.jsonl`` has means and
standard deviations per method and block of seeds. The files are append-only. Only lines of the baseline have the start
of a seed (``start_entropy``, ``start_avg_at_k``), because it is the same for all methods.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.studies.engine import Curves, Method, Setting, evaluation_steps
from recipes.studies.methods import BASELINE

ROOT = Path("benchmarks/results/studies")
KEPT_CURVES = ("entropy", "avg", "pass", "clip_low", "clip_high")
EQUAL_REWARD = 0.6  # accuracy at which methods are compared for entropy and pass@k

Row = dict[str, Any]


def digest(setting: Setting, method: Method) -> str:
    """A hash of the definition of a run. Results with another digest are not continued.

    Fields of a setting with repr=False count only when they differ from their default.
    """
    later = [f for f in fields(setting) if not f.repr and getattr(setting, f.name) != f.default]
    plain = [repr(setting), *(f"{f.name}={getattr(setting, f.name)!r}" for f in later)]
    parts = (sorted(getattr(method, g).items(), key=str) for g in ("loss", "selection", "schedule"))
    return hashlib.sha256(repr([*plain, *parts, method.advantage]).encode()).hexdigest()[:10]


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"


def read(path: Path) -> list[Row]:
    """The objects of a JSON-lines file; [] if there is no file.

    A torn last line, from a run that was killed while writing, is skipped.
    """
    rows: list[Row] = []
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number != len(lines):
                raise ValueError(f"{path} line {number} is not JSON: remove it or restore the file") from error
    return rows


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one line per object, in one write. A torn last line is removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read()
        if whole and not whole.endswith(b"\n"):
            file.truncate(whole.rfind(b"\n") + 1)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def rows_of(
    study: str, label: str, setting: Setting, name: str, method: Method, seeds: list[int], curves: Curves
) -> list[Row]:
    """One results row per seed."""
    starts = {"entropy": curves["entropy"][:, 0], "avg_at_k": curves["avg"][:, 0]} if name == BASELINE else {}
    mean = {key: curves[key].double().nanmean(1) for key in ("entropy", "clip_low", "clip_high", "kl")}
    rows = []
    for i, seed in enumerate(seeds):
        avg = curves["avg"][i, evaluation_steps(setting)].double()
        row: Row = {
            "study": study,
            "method": name,
            "seed": seed,
            "level": setting.level,
            "setting": label,
            **{f"start_{key}": _round(values[i]) for key, values in starts.items()},
            "final_entropy": _round(curves["entropy"][i, -1]),
            "entropy_auc": _round(mean["entropy"][i]),
            "avg_at_k": _round(avg[-1]),
            "pass_at_k": _round(curves["pass"][i, -1]),
            "clip_low": _round(mean["clip_low"][i], 5),
            "clip_high": _round(mean["clip_high"][i], 5),
            "collapsed": collapsed(avg, setting.reward),
            **at_equal_reward(setting, curves, i),
        }
        row |= per_pass({k: v[i] for k, v in curves.items() if k.startswith("pass_")})
        if "measured" in curves:
            row |= agreement({k: v[i] for k, v in curves.items() if k == "measured" or k.startswith("predicted")})
        if method.schedule["name"] == "entropy_target":
            row["tracking_error"] = tracking_error(method, setting, curves["entropy"][i])
        rows.append({**row, "digest": digest(setting, method), "command": f"make study STUDY={study}"})
    return [{**row, "machine": machine()} for row in rows]


def collapsed(avg: Tensor, reward: str) -> bool:
    """Whether held-out accuracy ends below its start, ends below half of its best, or is not finite.

    Without a learning signal (random rewards) only the last condition counts.
    """
    finite = bool(avg.isfinite().all())
    if reward == "random":
        return not finite
    return not finite or bool(avg[-1] < avg[0]) or bool(avg[-1] < 0.5 * avg.max())


def at_equal_reward(setting: Setting, curves: Curves, i: int) -> Row:
    """Entropy and pass@k where accuracy first reaches `EQUAL_REWARD`; {} if it never does.

    Values are interpolated between evaluations.
    """
    steps = evaluation_steps(setting)
    avg, entropies, passes = (curves[name][i, steps].double() for name in ("avg", "entropy", "pass"))
    reached = (avg >= EQUAL_REWARD).nonzero()
    if not len(reached) or reached[0] == 0:
        return {}
    k = int(reached[0])
    u = float((EQUAL_REWARD - avg[k - 1]) / (avg[k] - avg[k - 1]))
    entropy, passed = ((1 - u) * values[k - 1] + u * values[k] for values in (entropies, passes))
    return {"entropy_at_equal": _round(entropy), "pass_at_equal": _round(passed)}


def per_pass(series: Mapping[str, Tensor]) -> Row:
    """Means over the steps of a run of the values of `probes.Passes`: quantity -> one number per pass."""
    row: Row = {}
    for key in sorted(series):
        name, number = key.rsplit("_", 1)
        row.setdefault(name, []).append(_round(series[key].double().nanmean(), 5))
        assert len(row[name]) == int(number), "ten passes and more are not sorted"
    return row


def agreement(series: Mapping[str, Tensor]) -> Row:
    """Correlation, slope through the origin and sign agreement of each predictor with ``measured`` over a run."""
    row: Row = {}
    kept = series["measured"].isfinite()
    y = series["measured"][kept].double()
    for name, values in series.items():
        if name == "measured":
            continue
        x = values[kept].double()
        key = name.removeprefix("predicted_")
        centred = [v - v.mean() for v in (x, y)]
        norm = float(centred[0].norm() * centred[1].norm())
        row[f"corr_{key}"] = _round((centred[0] * centred[1]).sum() / norm) if norm else None
        row[f"slope_{key}"] = _round((x * y).sum() / x.square().sum()) if float(x.square().sum()) else None
        row[f"sign_{key}"] = _round((x.sign() == y.sign()).double().mean())
    return row


def tracking_error(method: Method, setting: Setting, entropy: Tensor) -> float:
    """Mean |H - H*| / H_init over the second half of the run."""
    h = entropy.double()
    x = torch.linspace(0, 1, len(h), dtype=torch.float64)
    start, end = float(method.schedule.get("start", 1.0)), float(method.schedule.get("end", 1.0))
    target = start + (end - start) * x if method.schedule["curve"] == "linear" else torch.full_like(h, start)
    half = len(h) // 2
    return _round((h / h[0] - target)[half:].abs().mean())


def curves_of(label: str, setting: Setting, name: str, method: Method, seeds: list[int], curves: Curves) -> Row:
    """Means and standard deviations over the seeds at the evaluation steps."""
    steps = evaluation_steps(setting)
    row: Row = {"setting": label, "method": name, "digest": digest(setting, method), "seeds": [seeds[0], seeds[-1]]}
    row |= {"n": len(seeds), "steps": steps}
    for key in KEPT_CURVES:
        values = curves[key].double()[:, steps]
        spread = values.std(0) if len(seeds) > 1 else torch.zeros(len(steps))
        row[key] = [[_round(v) for v in values.mean(0)], [_round(v) for v in spread]]
    return row


def _round(value: Tensor | float, digits: int = 4) -> float:
    """Round for JSON. Non-finite values become None, because JSON has no NaN."""
    number = float(value)
    return round(number, digits) if math.isfinite(number) else None  # type: ignore[return-value]
