"""Summarise the rows of a results file: means, intervals, paired differences, verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from recipes.studies.methods import BASELINE
from recipes.studies.results import Row
from recipes.studies.statistics import Interval, holm, interval, paired

METRICS = ("final_entropy", "entropy_auc", "avg_at_k", "pass_at_k")


@dataclass(frozen=True)
class Summary:
    """One method in one setting."""

    method: str
    seeds: int
    collapsed: int
    means: dict[str, Interval]
    """Means of `METRICS`, ``clip_low`` and ``clip_high``, where there are values."""
    differences: dict[str, tuple[Interval, float]]
    """Metric -> (method minus baseline over the same seeds, p-value after Holm's correction over the setting)."""

    @property
    def verdict(self) -> str:
        """Entropy and accuracy against the baseline at the 5 % level, corrected for all methods of the setting."""
        if not self.differences:
            return "baseline"
        words = []
        for metric, noun in (("final_entropy", "entropy"), ("avg_at_k", "accuracy")):
            if metric in self.differences:
                words.append(f"{noun} {direction(*self.differences[metric])}")
        return ", ".join(words)


def direction(difference: Interval, p: float) -> str:
    """higher | lower | no difference found | too few seeds."""
    if math.isnan(p):
        return "too few seeds"
    if p >= 0.05:
        return "no difference found"
    return "higher" if difference.mean > 0 else "lower"


def values(rows: Iterable[Row], metric: str) -> dict[int, float]:
    """Seed -> value, without the runs that have no value (not measured, not finite)."""
    return {row["seed"]: row[metric] for row in rows if row.get(metric) is not None}


def by_setting(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """Setting -> method -> rows, in file order."""
    table: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        table.setdefault(row["setting"], {}).setdefault(row["method"], []).append(row)
    return table


def summarise(methods: dict[str, list[Row]], baseline: str = BASELINE) -> list[Summary]:
    """A summary of each method of one setting, in the given order."""
    base = methods.get(baseline, [])
    raw: dict[str, dict[str, tuple[Interval, float]]] = {}
    for name, rows in methods.items():
        raw[name] = {}
        for metric in METRICS if name != baseline else ():
            mine, theirs = values(rows, metric), values(base, metric)
            if mine.keys() & theirs.keys():
                raw[name][metric] = paired(mine, theirs)
    for metric in METRICS:
        named = [name for name in raw if metric in raw[name]]
        for name, p in zip(named, holm([raw[n][metric][1] for n in named]), strict=True):
            raw[name][metric] = (raw[name][metric][0], p)
    out = []
    for name, rows in methods.items():
        means = {
            metric: interval(list(found.values()))
            for metric in (*METRICS, "clip_low", "clip_high")
            if (found := values(rows, metric))
        }
        out.append(Summary(name, len(rows), sum(row["collapsed"] for row in rows), means, raw[name]))
    return out
