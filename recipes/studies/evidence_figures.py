"""The figures of docs/evidence.md, from the rows of the results files."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from recipes.studies import figures, prediction
from recipes.studies.methods import BASELINE
from recipes.studies.results import Row
from recipes.studies.statistics import Interval, interval
from recipes.studies.summary import by_setting, summarise, values

Results = Callable[[str], list[Row]]


def leaderboard(rows: list[Row], left: str = "16 updates", right: str = "64 updates") -> Any:
    """All methods: difference in entropy and accuracy to the baseline, and accuracy at many updates per batch."""
    settings = by_setting(rows)
    mild = {s.method: s for s in summarise(settings[left])}
    many = {s.method: s for s in summarise(settings[right])}
    order = sorted(
        (m for m in mild if m != BASELINE and m in many), key=lambda m: mild[m].differences["final_entropy"][0].mean
    )
    result, axes = figures.figure(11.0, 0.23 * len(order) + 1.6, 1, 3, sharey=True)
    entropy, accuracy, stable = axes[0]
    for y, name in enumerate(order):
        _dot(entropy, y, *mild[name].differences["final_entropy"])
        _dot(accuracy, y, *mild[name].differences["avg_at_k"], scale=100)
        s = many[name]
        mean = s.means["avg_at_k"]
        share = s.collapsed / s.seeds
        stable.errorbar(100 * mean.mean, y, xerr=100 * mean.half, fmt="o", color="black", markersize=5, capsize=2,
                        markerfacecolor="white" if share > 0.5 else "black", elinewidth=1)  # fmt: skip
        if s.collapsed:
            stable.annotate(f"{s.collapsed}/{s.seeds} collapsed", (100 * mean.mean, y), (9, -3),
                            textcoords="offset points", fontsize=7)  # fmt: skip
    base = many[BASELINE]
    stable.axvline(100 * base.means["avg_at_k"].mean, color="black", linestyle="--", linewidth=0.9)
    start = values(settings[right][BASELINE], "start_avg_at_k").values()
    stable.axvline(100 * sum(start) / len(start), color="#999999", linestyle=":", linewidth=1.2)
    for ax in (entropy, accuracy):
        ax.axvline(0, color="black", linestyle="--", linewidth=0.9)
    entropy.set_yticks(range(len(order)), order, fontsize=8)
    entropy.set_ylim(-0.8, len(order) - 0.2)
    base_mild = mild[BASELINE].means
    entropy.set_title(
        f"{left} a batch: entropy,\nminus {BASELINE}'s {base_mild['final_entropy'].mean:.2f} nats", fontsize=9
    )
    accuracy.set_title(
        f"{left} a batch: accuracy,\nminus {BASELINE}'s {100 * base_mild['avg_at_k'].mean:.0f} %, points", fontsize=9
    )
    accuracy.set_xlim(-11, 13)
    for y, name in enumerate(order):
        if (found := mild[name].differences["avg_at_k"][0].mean) < -0.11:
            accuracy.annotate(f"◄ {100 * found:.0f}", (-10.8, y), fontsize=8, va="center")
    stable.set_title(
        f"{right} a batch: accuracy, %\n(dashed: {BASELINE}, {base.collapsed}/{base.seeds} collapsed; dotted: start)",
        fontsize=9,
    )
    return result


def _dot(ax: Any, y: int, difference: Interval, p: float, scale: float = 1.0) -> None:
    """Draw a difference with its interval. A filled dot is significant after Holm's correction."""
    ax.errorbar(scale * difference.mean, y, xerr=scale * difference.half, fmt="o", color="black", markersize=5,
                capsize=2, elinewidth=1, markerfacecolor="black" if p < 0.05 else "white")  # fmt: skip


MAP_CAPTION = (
    "accuracy after training (upper number, %) and entropy (lower, nats) over updates per batch and learning rate; "
    "white: learns, dark: at or below its start; a number in brackets: collapsed runs."
)


def map_figure(rows: list[Row], level: str) -> Any:
    """One heat map per method: accuracy as lightness, numbers in the cells."""
    cells: dict[str, dict[tuple[int, float], list[Row]]] = {}
    for row in rows:
        if row["level"] == level:
            updates, rate = row["setting"].removeprefix(f"{level} ").split(" x ")
            cells.setdefault(row["method"], {}).setdefault((int(updates), float(rate)), []).append(row)
    result, axes = figures.figure(11.0, 3.1 * math.ceil(max(len(cells), 1) / 3), math.ceil(max(len(cells), 1) / 3), 3)
    for ax in axes.flat[len(cells) :]:
        ax.axis("off")
    for ax, (method, grid) in zip(axes.flat, cells.items(), strict=False):
        xs, ys = sorted({x for x, _ in grid}), sorted({y for _, y in grid})
        image = [[_mean(grid.get((x, y), []), "avg_at_k") for x in xs] for y in ys]
        ax.imshow(image, cmap="gray", vmin=0.0, vmax=1.0, origin="lower", aspect="auto")
        for j, y in enumerate(ys):
            for i, x in enumerate(xs):
                found = grid.get((x, y), [])
                if not found:
                    continue
                lost = sum(row["collapsed"] for row in found)
                text = f"{100 * image[j][i]:.0f}\n{_mean(found, 'final_entropy'):.2f}"
                text += f"\n({lost}/{len(found)})" if lost else ""
                colour = "black" if image[j][i] > 0.45 else "white"
                ax.text(i, j, text, ha="center", va="center", fontsize=7.5, color=colour)
        ax.set_xticks(range(len(xs)), [f"{x}" for x in xs])
        ax.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
        ax.set(xlabel="updates per batch", ylabel="learning rate")
        ax.set_title(method, fontsize=9.5)
        ax.grid(False)
    return result


def _mean(rows: list[Row], metric: str) -> float:
    found = [row[metric] for row in rows if row.get(metric) is not None]
    return sum(found) / len(found) if found else math.nan


def random_figure(read: Results) -> Any:
    """Clip-Low/Clip-High fig. 3: final entropy over each clip bound."""
    methods = {s.method: s for s in summarise(by_setting(read("random_rewards"))["random"])}
    start = values(by_setting(read("random_rewards"))["random"][BASELINE], "start_entropy").values()
    result, axes = figures.figure(8.6, 3.0, 1, 2, sharey=True)
    for ax, side, other in zip(axes[0], ("low", "high"), ("high", "low"), strict=True):
        ticks = ["0.05", "0.1", "0.15", "0.2", "0.3", "off"]
        names = [BASELINE if tick == "0.2" else f"eps_{side} {tick}" for tick in ticks]
        found = [methods[name].means["final_entropy"] for name in names]
        ax.errorbar(range(6), [f.mean for f in found], [f.half for f in found], fmt="o-", color="black", capsize=3)
        ax.axhline(sum(start) / len(start), color="#777777", linestyle=":", linewidth=1.2)
        ax.set_xticks(range(6), ticks)
        ax.set(xlabel=f"eps_{side} (eps_{other} 0.2)")
    axes[0][0].set_ylabel("entropy after 60 steps, nats")
    axes[0][0].annotate("start", (0.02, 0.93), xycoords="axes fraction", fontsize=8, color="#555555")
    return result


def betas_figure(read: Results) -> Any:
    """Final entropy at 16 updates, entropy and accuracy at 64 updates, over beta1 (x) and beta2 (y)."""
    table = by_setting(read("betas"))
    every = (("16 updates", "final_entropy", "entropy"), ("64 updates", "final_entropy", "entropy"),
             ("64 updates", "avg_at_k", "accuracy"))  # fmt: skip
    panels = [panel for panel in every if panel[0] in table]
    result, axes = figures.figure(4.2 * len(panels), 3.4, 1, len(panels))
    for ax, (setting, metric, title) in zip(axes[0], panels, strict=True):
        found = {s.method: s.means[metric] for s in summarise(table[setting])}
        grid = [b for b in (0.0, 0.25, 0.5, 0.75, 1.0) if b == 0 or beta_name(b, b) in found]
        cells = [[found[beta_name(b1, b2)] for b1 in grid] for b2 in grid]
        image = [[c.mean for c in line] for line in cells]
        shown = ax.imshow(image, cmap="gray", origin="lower", aspect="auto")
        low, high = shown.get_clim()
        for j, line in enumerate(cells):
            for i, cell in enumerate(line):
                dark = (cell.mean - low) / (high - low) < 0.45
                ax.text(i, j, f"{cell.mean:.2f}\n±{cell.half:.2f}", ha="center", va="center", fontsize=7,
                        color="white" if dark else "black")  # fmt: skip
        for ticks in (ax.set_xticks, ax.set_yticks):
            ticks(range(len(grid)), [f"{b:g}" for b in grid])
        ax.set(xlabel="beta1", ylabel="beta2")
        ax.set_title(f"{title}, {setting}", fontsize=9.5)
        ax.grid(False)
    return result


def beta_name(b1: float, b2: float) -> str:
    return f"CE-GPPO ({b1:g}, {b2:g})" if b1 or b2 else BASELINE


def schedules_figure(curves: dict[tuple[str, str], dict[str, Any]]) -> Any:
    """Entropy of ID, DID and OD minus that of GRPO, over the steps."""
    result, axes = figures.figure(8.6, 3.0, 1, 2, sharey=True)
    panels = (
        ("ID 0.5", "ID, static", "DID 0.5", "DID, static"),
        ("OD 0.65", "OD 0.65, static", "dynamic upper", "dynamic lower"),
    )
    for ax, names in zip(axes[0], panels, strict=True):
        base = curves["16 updates", BASELINE]
        for name, style in zip(names, figures.LINES, strict=False):
            line = curves["16 updates", name]
            difference = [a - b for a, b in zip(line["entropy"][0], base["entropy"][0], strict=True)]
            ax.plot(line["steps"], difference, **style, markevery=5, markersize=4, label=name)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(xlabel="step")
        ax.legend(fontsize=7.5)
    axes[0][0].set_ylabel("entropy minus GRPO's, nats")
    return result


def prediction_figure(lines: list[Row]) -> Any:
    """One panel per full-stack method: measured over predicted change, one point per rollout step of every run."""
    methods: dict[str, list[list[tuple[float, float]]]] = {}
    for line in lines:
        methods.setdefault(line["method"], []).append([(x, y) for x, y in line["changes"]])
    result, axes = figures.figure(3.7 * len(methods), 3.0, 1, len(methods), sharey=True)
    for ax, (name, runs) in zip(axes[0], methods.items(), strict=True):
        x, y = zip(*(pair for pairs in runs for pair in pairs), strict=True)
        ax.plot([1e6 * v for v in x], y, ".", color="black", markersize=3, alpha=0.5)
        ax.axhline(0, color="#777777", linewidth=0.8)
        ax.axvline(0, color="#777777", linewidth=0.8)
        ax.set(xlabel="predicted, 1e-6 nats")
        found = [agreement.correlation for pairs in runs if (agreement := prediction.agreement(pairs))]
        ax.set_title(f"{name}: r = {interval(found):.2f}, {len(runs)} runs" if found else name, fontsize=9)
    axes[0][0].set_ylabel("measured, nats")
    return result


def full_stack_figure(lines: list[Row]) -> Any:
    """Full-stack runs over the steps: entropy, entropy and reward minus the baseline of the same seeds, clipped tokens.

    Means with 95 % bands over seeds. Rewards are smoothed over five steps.
    """
    methods: dict[str, dict[int, Row]] = {}
    for line in lines:
        if "entropy" in line:  # lines of older runs have only the pairs of `prediction_figure`
            methods.setdefault(line["method"], {})[line["seed"]] = line
    base = methods.get(BASELINE, {})
    result, axes = figures.figure(12.0, 3.0, 1, 4)
    levels, against, reward, clipped = axes[0]
    for (name, runs), style in zip(methods.items(), figures.LINES, strict=False):
        _band(levels, [run["entropy"] for run in runs.values()], style, f"{name}, {len(runs)} runs")
        _band(clipped, [[100 * v for v in run["clip_low"]] for run in runs.values()], style)
        both = [(run, base[seed]) for seed, run in runs.items() if seed in base and name != BASELINE]
        for ax, key, window in ((against, "entropy", 1), (reward, "reward", 5)):
            pairs = [(_smooth(mine[key], window), _smooth(theirs[key], window)) for mine, theirs in both]
            _band(ax, [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs], style)
    for ax in (against, reward):
        ax.axhline(0, color="black", linewidth=0.8)
    titles = (
        "entropy, nats",
        f"entropy minus {BASELINE}'s",
        f"reward minus {BASELINE}'s, mean of 5 steps",
        "clipped below, %",
    )
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set(xlabel="step")
        ax.set_title(title, fontsize=9)
    levels.legend(fontsize=7.5)
    return result


def _smooth(values: list[float], window: int) -> list[float]:
    return [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]


def _band(ax: Any, runs: list[list[float]], style: dict[str, Any], label: str | None = None) -> None:
    """Draw the mean over runs and its 95 % interval at every step that all runs have."""
    found = [interval(column) for column in zip(*runs, strict=False)]
    steps = range(1, len(found) + 1)
    ax.plot(steps, [f.mean for f in found], **style, markevery=10, markersize=4, label=label)
    if len(runs) > 1:
        ax.fill_between(
            steps, [f.low for f in found], [f.high for f in found], color=style["color"], alpha=0.15, linewidth=0
        )
