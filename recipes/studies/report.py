"""Write the page of a study from its results files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recipes.studies import evidence_figures, figures, pages, results
from recipes.studies.engine import PASS_K
from recipes.studies.methods import BASELINE, HEADLINE
from recipes.studies.results import Row
from recipes.studies.statistics import Interval, interval, student_quantile
from recipes.studies.summary import Summary, by_setting, summarise

CURVE_TITLES = {
    "entropy": "Entropy, nats per token",
    "avg": "Accuracy (expected reward, held-out prompts)",
    "pass": f"pass@{PASS_K}, held-out prompts",
    "clip_low": "Share of tokens clipped below",
    "clip_high": "Share of tokens clipped above",
}


def merge_curves(lines: Iterable[Row]) -> dict[tuple[str, str], dict[str, Any]]:
    """Join the blocks of seeds: (setting, method) -> steps and, per curve, (means, standard deviations)."""
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        key = line["setting"], line["method"]
        known = merged.get(key)
        if known is None or known["digest"] != line["digest"]:  # a new definition replaces the curves of the old one
            merged[key] = line
            continue
        n, m = known["n"], line["n"]
        joined = {**line, "n": n + m}
        for name in results.KEPT_CURVES:
            (mean_a, std_a), (mean_b, std_b) = known[name], line[name]
            points = zip(mean_a, std_a, mean_b, std_b, strict=True)
            joined[name] = list(zip(*(_join(n, a, s, m, b, t) for a, s, b, t in points), strict=True))
        merged[key] = joined
    return merged


def _join(n: int, a: float | None, s: float | None, m: int, b: float | None, t: float | None) -> tuple[Any, Any]:
    """Mean and sample standard deviation of two joined blocks (Chan et al. 1983)."""
    if a is None or b is None or s is None or t is None:
        return None, None
    mean = (n * a + m * b) / (n + m)
    squares = (n - 1) * s * s + (m - 1) * t * t + n * m / (n + m) * (a - b) ** 2
    return mean, math.sqrt(squares / (n + m - 1))


def curve_figure(curves: dict[tuple[str, str], dict[str, Any]], setting: str, names: Sequence[str]) -> Any:
    """Entropy, accuracy, pass@k and clip fractions of the named methods: means with 95 % bands."""
    shown = [name for name in names if (setting, name) in curves][: len(figures.LINES)]
    result, axes = figures.figure(11.0, 6.0, 2, 3)
    for ax, (key, title) in zip(axes.flat, CURVE_TITLES.items(), strict=False):
        for name, style in zip(shown, figures.LINES, strict=False):
            line = curves[setting, name]
            points = [
                (x, mean, student_quantile(0.95, max(line["n"] - 1, 1)) * std / math.sqrt(line["n"]))
                for x, mean, std in zip(line["steps"], *line[key], strict=True)
                if mean is not None
            ]
            x, mean, half = zip(*points, strict=True)
            ax.plot(x, mean, **style, markevery=max(1, len(x) // 6), markersize=4, label=name)
            low = [m - h for m, h in zip(mean, half, strict=True)]
            high = [m + h for m, h in zip(mean, half, strict=True)]
            ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        ax.set_title(title, fontsize=9.5)
        ax.set_xlabel("step")
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center left", fontsize=9)
    return result


def table(title: str, found: list[Summary], note: str = "") -> pages.Table:
    """The final table of one setting."""
    head = ["method", "entropy", "difference", "area under entropy", f"avg@{PASS_K}", "difference", f"pass@{PASS_K}"]
    head += ["difference", "clipped low / high, %", "collapsed", "seeds", "against GRPO"]
    rows = []
    for s in found:
        cells = [s.method]
        for metric, both in (("final_entropy", True), ("entropy_auc", False), ("avg_at_k", True), ("pass_at_k", True)):
            cells.append(f"{s.means[metric]:.3f}" if metric in s.means else "–")
            if both:
                cells.append(f"{s.differences[metric][0]:+.3f}" if metric in s.differences else "–")
        clips = [f"{100 * s.means[c].mean:.2f}" if c in s.means else "–" for c in ("clip_low", "clip_high")]
        cells += [" / ".join(clips), f"{s.collapsed}", f"{s.seeds}", s.verdict]
        rows.append(pages.Row(cells, mark=s.method == BASELINE))
    return pages.Table(title, head, rows, note)


def study_page(name: str, title: str, question: str, path: Path, root: Path = results.ROOT) -> Path:
    """Write the page of a study from its results and curves."""
    rows = results.read(root / f"{name}.jsonl")
    lines = results.read(root / "curves" / f"{name}.jsonl")
    curves = merge_curves(line for line in lines if "setting" in line)
    seeds = sorted({row["seed"] for row in rows})
    lead = [
        question,
        f"{len(rows)} runs, seeds {seeds[0]} to {seeds[-1]}, every seed with its own start; ± and bands are 95 % t "
        f"intervals over seeds; differences are paired with {BASELINE} by seed. Verdicts: 5 % after Holm's correction "
        "over the methods of a setting. Collapsed: accuracy ends below its start, or below half of its best; such runs "
        "are counted and stay in every mean.",
        f"Command: {rows[0]['command']}. Machine: {rows[0]['machine']}.",
    ]
    charts, tables = [], []
    note = "Prediction: means over runs, per predictor." if any("corr_token" in row for row in rows) else ""
    for setting, methods in by_setting(rows).items():
        tables.append(table(setting, summarise(methods)))
        if note:
            tables.append(prediction_table(f"{setting}: predicted and measured change of entropy", methods))
        shown = [m for m in (*[h for h in HEADLINE if h in methods], *methods) if m in methods]
        if any((setting, m) in curves for m in methods):
            figure = curve_figure(curves, setting, list(dict.fromkeys(shown)))
            charts.append((f"{setting}: means and 95 % bands over seeds.", figures.inline(figure, setting)))
    if name == "map":
        charts += [
            (
                f"{level}: {evidence_figures.MAP_CAPTION}",
                figures.inline(evidence_figures.map_figure(rows, level), level),
            )
            for level in ("L1", "L2")
        ]
    return pages.write(path, title, lead, charts, tables)


def mean_of(rows: list[Row], key: str) -> Interval | None:
    """Mean and interval of a column over the runs that have it; None if no run has it."""
    found = [row[key] for row in rows if row.get(key) is not None]
    return interval(found) if found else None


def prediction_table(title: str, methods: dict[str, list[Row]]) -> pages.Table:
    """Correlation, slope and sign agreement of each predictor: mean and 95 % interval over runs."""
    predictors = ("token", "gradient", "adam", "step")
    head = ["method", *(f"{what}, {p}" for p in predictors for what in ("corr.", "slope", "sign"))]
    rows = []
    for name, found in methods.items():
        cells = [name]
        for predictor in predictors:
            for what in ("corr", "slope", "sign"):
                value = mean_of(found, f"{what}_{predictor}")
                cells.append("–" if value is None else f"{value:.2f}")
        rows.append(pages.Row(cells, mark=name == BASELINE))
    return pages.Table(title, head, rows)
