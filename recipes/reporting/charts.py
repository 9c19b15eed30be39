"""Charts of the report: small inline SVGs that take their colours from the page, so that light and dark both read well.

matplotlib draws with sentinel colours; `_inline` turns them into CSS variables and strips what only a standalone file
needs (prolog, metadata, namespaces), so the page contains no address at all.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from recipes.studies import prediction

if TYPE_CHECKING:  # matplotlib takes 0.5 s to import, and only a process that writes a report needs it
    from matplotlib.figure import Figure

Series = dict[str, list[tuple[float, float]]]
Pairs = list[tuple[float, float]]  # (step, value)
Line = tuple[str, Pairs, tuple[Pairs, Pairs]]  # label, values, ends of their intervals


class Chart(NamedTuple):
    """A chart as a picture, which needs no script, and the numbers from which the page's script draws it."""

    title: str
    caption: str
    svg: str
    lines: list[
        dict[str, Any]
    ]  # label, run (its index), colour (its index), points; low and high; none: a picture only
    percent: bool = False


COLOURS = 7  # series colours that the page defines: --s0 .. --s6, the last one grey
_INK, _GRID = "#0a0b01", "#0a0b02"
_POINTS = 300  # longer series are averaged in bins of steps: a screen shows no more
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
# (title, caption, {label: metric}, kind). With several runs each metric gets a chart of its own.
_LINES: list[tuple[str, str, dict[str, str], bool]] = [
    ("Entropy", "Mean over all response tokens, nats", {"": "actor/entropy"}, False),
    ("Training reward", "Mean of a step", {"": "critic/rewards/mean"}, False),
    (
        "Clipped tokens",
        "Share of response tokens whose ratio is below (low) or above (high) the clip range",
        {"low": "actor/pg_clipfrac_low", "high": "actor/pg_clipfrac_high"},
        True,
    ),
    (
        "Entropy change in a step",
        "Nats per token, on the step's own tokens. Predicted: first order, slope x learning rate x updates; measured: "
        "where train.entropy_probe_every asks for it. Adam rescales gradients: compare signs and trends, not sizes.",
        {"predicted": "theory/entropy_change_predicted", "measured": "theory/entropy_change_same_tokens"},
        False,
    ),
    ("Gradient norm", "Before clipping", {"": "actor/grad_norm"}, False),
    ("Policy KL", "Estimated KL from the rollout policy to the updated one, nats", {"": "actor/ppo_kl"}, False),
    ("Response length", "Mean, tokens", {"": "response_length/mean"}, False),
    ("Cut off", "Share of responses that hit the length limit", {"": "response_length/clip_ratio"}, True),
    ("KL to the reference", "Estimated, mean over response tokens, nats", {"": "actor/kl_ref"}, False),
    ("Critic: value loss", "Mean over response tokens", {"": "critic/value_loss"}, False),
    (
        "Critic: explained variance",
        "Share of the returns' variance that values account for before the step's updates; 0: none, 1: all",
        {"": "critic/explained_variance"},
        False,
    ),
    ("Throughput", "Tokens per second of a whole step", {"": "perf/throughput"}, False),
    (
        "Learner speed",
        "TFLOP/s per rank while its models compute; recomputation and padding do not count",
        {"": "perf/tflops_per_rank"},
        False,
    ),
    ("MFU", "Model FLOPs utilisation of the learner while its models compute", {"": "perf/mfu"}, True),
    (
        "Rollout and learner",
        "Mean |Δp| between the rollout engine and the learner on the same tokens; above 0.01 something is wrong",
        {"": "rollout_agreement/abs_dp_mean"},
        False,
    ),
]
# metric of an evaluation: its set, kind, and k
EVALUATION = re.compile(r"^val-core/(?P<set>.+)/(?P<kind>avg|pass)@(?P<k>\w+)$")


def _sentinel(index: int) -> str:
    return f"#0a0c{index % COLOURS:02x}"


def _inline(figure: Figure, label: str) -> str:
    """The figure as an SVG element that lives in a page, with the page's colours and fonts."""
    buffer = io.StringIO()
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": label}):  # element ids: the same every time, different per chart
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg.split(">", 1)[0], flags=re.DOTALL) + (
        ' role="img">' + svg.split(">", 1)[1]
    )
    svg = svg.replace("'DejaVu Sans'", "inherit").replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    for i in range(COLOURS):
        svg = svg.replace(_sentinel(i), f"var(--s{i})")
    return re.sub(r"\n\s*", "\n", svg)


def binned(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Steps and values, averaged in equal bins of points when there are more than a chart can show."""
    size = -(-len(pairs) // _POINTS)
    bins = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [sum(s for s, _ in b) / len(b) for b in bins], [sum(v for _, v in b) / len(b) for b in bins]


def running_mean(values: list[float]) -> list[float]:
    """Centred mean over about a tenth of the series: the trend under the noise of single steps."""
    half = len(values) // 20
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def _draw(title: str, plot: Callable[[Any], None]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 2.3))
        axes = figure.subplots()
        axes.tick_params(length=0)
        axes.grid(axis="x", visible=False)
        plot(axes)
        return _inline(figure, title)


def _finish(axes: Any, unit: str, labels: int) -> None:
    """Axis texts and the legend above the plot; ``unit`` is a format of ``x``."""
    axes.set_xlabel("step")
    axes.margins(x=0.02, y=0.12)
    axes.yaxis.set_major_formatter(unit)
    if unit.endswith("%"):
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))  # no share is negative
    if labels:
        columns = min(3, labels)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0, handlelength=1.2)


def _line_chart(title: str, lines: list[tuple[str, list[tuple[float, float]]]], percent: bool = False) -> str:
    """Thin line: single steps. Thick line: running mean. Short series are joined points."""

    def plot(axes: Any) -> None:
        for i, (label, pairs) in enumerate(lines):
            steps, values = binned(pairs)
            values = [100 * v for v in values] if percent else values
            dash = "-" if i < COLOURS else "--"
            if len(values) < 20:
                axes.plot(steps, values, dash, color=_sentinel(i), label=label, marker="o", markersize=4)
            else:
                axes.plot(steps, values, dash, color=_sentinel(i), linewidth=0.8, alpha=0.35)
                axes.plot(steps, running_mean(values), dash, color=_sentinel(i), label=label)
        _finish(axes, "{x:g} %" if percent else "{x:g}", sum(bool(label) for label, _ in lines))

    return _draw(title, plot)


def phases(series: Series) -> dict[str, list[tuple[float, float]]]:
    """Phases of a step, in order, as (step, seconds): those that follow each other, so that they add up to the step.

    With asynchronous generation `generate` and `reward` run beside the update; then only the `wait` for them counts.
    """

    def total(name: str) -> float:
        return sum(value for _, value in series.get(f"timing_s/{name}", []))

    overlap = "timing_s/wait" in series and total("generate") + total("reward") > 1.05 * total("wait")
    names = ["wait"] if overlap else ["generate", "reward"]
    names += ["statistics", "update", "sync", "save"]
    return {name: series[f"timing_s/{name}"] for name in names if f"timing_s/{name}" in series}


def _evaluation_charts(runs: dict[str, Series], used: set[str]) -> list[Chart]:
    """One chart per held-out set (per set and metric with several runs); only curves, so two points at least.

    pass@1 is left out beside avg@k: both estimate the same number, and from the same samples they are equal.
    """
    groups: dict[str, list[Line]] = {}
    for name, series in runs.items():
        used.update(key for key in series if key.startswith("val-core/"))
        for key in sorted(series):
            match = EVALUATION.match(key)
            if not match or len(series[key]) < 2 or match["kind"] + match["k"] == "pass1":
                continue
            metric = f"{match['kind']}@{match['k']}"
            title, label = (match["set"], metric) if len(runs) == 1 else (f"{match['set']}, {metric}", name)
            interval = series.get(f"{key}/low", []), series.get(f"{key}/high", [])
            groups.setdefault(title, []).append((label, series[key], interval))
    caption = "Share of problems solved"
    if any(low for lines in groups.values() for _, _, (low, _) in lines):
        caption += "; bars: 95 % interval"
    return [
        Chart(
            f"Held-out accuracy: {title}",
            caption,
            _draw(title, partial(_plot_evaluation, lines=lines)),
            [
                _numbers(label, pairs, runs, colour, low, high)
                for colour, (label, pairs, (low, high)) in enumerate(lines)
            ],
            True,
        )
        for title, lines in groups.items()
    ]


def _numbers(
    label: str, pairs: Pairs, runs: dict[str, Series], colour: int, low: Pairs | None = None, high: Pairs | None = None
) -> dict[str, Any]:
    """A line for the page's script."""
    run = list(runs).index(label) if len(runs) > 1 else 0
    line = {"label": label, "run": run, "colour": colour % COLOURS, "points": pairs}
    return line | ({"low": low, "high": high} if low and high and len(low) == len(high) == len(pairs) else {})


def _plot_evaluation(axes: Any, lines: list[Line]) -> None:
    for i, (label, pairs, (low, high)) in enumerate(lines):
        colour = _sentinel(i)
        axes.plot([s for s, _ in pairs], [100 * v for _, v in pairs], "-o", color=colour, markersize=4, label=label)
        if len(low) == len(high) == len(pairs):
            axes.vlines([s for s, _ in pairs], [100 * v for _, v in low], [100 * v for _, v in high], colors=colour)
    _finish(axes, "{x:g} %", len(lines))


def _time_chart(series: Series) -> tuple[str, dict[str, Pairs]]:
    """Stacked seconds per step of each phase, and the numbers; what the phases leave of the step is "other"."""
    total = dict(series["timing_s/step"])
    steps = sorted(total)
    bands = {name: [dict(pairs).get(s, 0.0) for s in steps] for name, pairs in phases(series).items()}
    spent = [sum(values[i] for values in bands.values()) for i in range(len(steps))]
    bands["other"] = [max(0.0, total[s] - t) for s, t in zip(steps, spent, strict=True)]

    def plot(axes: Any) -> None:
        thinned = {name: binned(list(zip(steps, values, strict=True))) for name, values in bands.items()}
        axes.stackplot(
            thinned["other"][0],
            [values for _, values in thinned.values()],
            labels=list(bands),
            colors=[_sentinel(i) for i in range(len(bands))],
            alpha=0.85,
            linewidth=0,
        )
        _finish(axes, "{x:g} s", len(bands))
        axes.margins(x=0)

    return _draw("time", plot), {name: list(zip(steps, values, strict=True)) for name, values in bands.items()}


def _prediction_chart(series: Series) -> Chart | None:
    """Every step's predicted change of entropy against the measured one."""
    pairs = prediction.changes(series)
    found = prediction.agreement(pairs)
    if found is None:
        return None

    def plot(axes: Any) -> None:
        axes.scatter(*zip(*pairs, strict=True), s=9, color=_sentinel(0), alpha=0.7, linewidths=0)
        axes.axhline(0, color=_GRID, linewidth=0.8)
        axes.axvline(0, color=_GRID, linewidth=0.8)
        _finish(axes, "{x:g}", 0)
        axes.set_xlabel("predicted, nats")

    probed = "theory/entropy_change_same_tokens" in series
    caption = f"Measured ({'same tokens' if probed else 'to the next batch'}) over predicted, a point per step: {found}"
    return Chart("Entropy change, predicted and measured", caption, _draw("prediction", plot), [])


def main_charts(runs: dict[str, Series]) -> tuple[list[Chart], set[str]]:
    """The charts that every reader wants, and the metrics that they used up.

    Args:
        runs: run name -> metric -> (step, value) pairs. Several runs are overlaid, one colour each.
    """
    used: set[str] = set()
    charts = _evaluation_charts(runs, used)
    for title, caption, metrics, percent in _LINES:
        lines = [
            (label if len(runs) == 1 else name, metric, series[metric])
            for label, metric in metrics.items()
            for name, series in runs.items()
            if metric in series
        ]
        used.update(metric for _, metric, _ in lines)
        if len(runs) == 1 and lines:
            drawn = [(label, pairs) for label, _, pairs in lines]
            numbers = [_numbers(label, pairs, runs, i) for i, (label, pairs) in enumerate(drawn)]
            charts.append(Chart(title, caption, _line_chart(title, drawn, percent), numbers, percent))
            continue
        for label, metric in metrics.items():
            of_metric = [(name, pairs) for name, key, pairs in lines if key == metric]
            full = f"{title}, {label}" if label else title
            if of_metric:
                numbers = [_numbers(name, pairs, runs, i) for i, (name, pairs) in enumerate(of_metric)]
                charts.append(Chart(full, caption, _line_chart(full, of_metric, percent), numbers, percent))
    if len(runs) == 1:
        (series,) = runs.values()
        if chart := _prediction_chart(series):
            charts.append(chart)
        if "timing_s/step" in series:
            used.update(key for key in series if key.startswith("timing_s/"))
            svg, bands = _time_chart(series)
            numbers = [_numbers(name, pairs, runs, i) for i, (name, pairs) in enumerate(bands.items())]
            charts.append(Chart("Where the time goes", "Seconds per step", svg, numbers))
    return charts, used


def other_charts(runs: dict[str, Series], used: set[str]) -> list[Chart]:
    """Everything else that was logged and changes, by name: diagnostics of schedules, selections, entropy theory."""
    names = sorted({key for series in runs.values() for key in series} - used)
    charts = []
    for metric in names:
        lines = [(name if len(runs) > 1 else "", series[metric]) for name, series in runs.items() if metric in series]
        if any(len({value for _, value in pairs}) > 1 for _, pairs in lines):
            numbers = [_numbers(label, pairs, runs, i) for i, (label, pairs) in enumerate(lines)]
            charts.append(Chart(metric, "", _line_chart(metric, lines), numbers))
    return charts
