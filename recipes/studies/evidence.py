"""docs/evidence.md: its tables and figures, generated from the committed results.

The text is written by hand; a table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` and is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.studies import figures, prediction, report, results
from recipes.studies.claims import CLAIMS, FULL, decide
from recipes.studies.methods import BASELINE
from recipes.studies.results import Row
from recipes.studies.statistics import Interval, holm, paired
from recipes.studies.summary import by_setting, direction, summarise, values

FIGURES = Path("docs/figures")
DOCUMENT = Path("docs/evidence.md")
SHORT = {"final_entropy": "entropy", "avg_at_k": "accuracy", "pass_at_k": "pass@8"}

Results = Callable[[str], list[Row]]


def reader(root: Path = results.ROOT) -> Results:
    """Study -> rows, each file read once."""
    known: dict[str, list[Row]] = {}

    def read(study: str) -> list[Row]:
        if study not in known:
            known[study] = results.read(root / f"{study}.jsonl")
        return known[study]

    return read


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def signed(value: Interval) -> str:
    return f"{value:+.3f}"


# --- tables ----------------------------------------------------------------------------------------------------------


def claims_table(read: Results) -> str:
    """Every claim in every setting that has results, with the verdict."""
    rows = []
    for claim in CLAIMS:
        for finding in decide(claim, read(claim.study)):
            d = finding.difference
            what = f"{claim.method} − {claim.other}, {SHORT[claim.metric]}"
            verdict = finding.verdict if finding.verdict == "holds" else f"**{finding.verdict}**"
            rows.append([claim.text, claim.paper, _level(finding.setting), what, signed(d), str(d.n), verdict])
    return markdown(["claim", "paper", "setting", "compared", "difference, 95 %", "seeds", "verdict"], rows)


def _level(setting: str) -> str:
    if setting in FULL:
        return f"L3, {setting}"
    return setting if setting.startswith("L2") else f"L1, {setting}"


def leaderboard_table(read: Results) -> str:
    """All methods of L1, by accuracy under many updates."""
    settings = by_setting(read("losses"))
    mild, many = ({s.method: s for s in summarise(settings[name])} for name in ("16 updates", "64 updates"))
    rows = []
    for name in sorted((m for m in mild if m in many), key=lambda m: -many[m].means["avg_at_k"].mean):
        a, b = mild[name], many[name]
        d = a.differences.get("final_entropy")
        rows.append(
            [
                name,
                f"{a.means['final_entropy']:.3f}",
                "–" if d is None else signed(d[0]),
                f"{a.means['entropy_auc'].mean:.2f}",
                f"{a.means['avg_at_k']:.3f}",
                f"{b.means['avg_at_k']:.3f}",
                f"{b.means['pass_at_k'].mean:.3f}",
                f"{b.means['final_entropy']:.2f}",
                f"{100 * b.means['clip_low'].mean:.1f} / {100 * b.means['clip_high'].mean:.1f}",
                f"{b.collapsed}/{b.seeds}",
            ]
        )
    head = ["method", "entropy", "− GRPO", "area", "accuracy", "accuracy, 64", "pass@8, 64", "entropy, 64"]
    return markdown([*head, "clipped low / high, %", "collapsed, 64"], rows)


def study_table(study: str, setting: str) -> Callable[[Results], str]:
    """Entropy and accuracy of one setting with differences and verdicts."""

    def make(read: Results) -> str:
        rows = []
        for s in summarise(by_setting(read(study)).get(setting, {})):
            cells = [s.method]
            for metric in ("final_entropy", "avg_at_k", "pass_at_k"):
                cells.append(f"{s.means[metric]:.3f}" if metric in s.means else "–")
                cells.append(signed(s.differences[metric][0]) if metric in s.differences else "–")
            rows.append([*cells, f"{s.collapsed}/{s.seeds}", s.verdict])
        head = ["method", "entropy", "− GRPO", "accuracy", "− GRPO", "pass@8", "− GRPO", "collapsed", "verdict"]
        return markdown(head, rows)

    return make


def targets_table(read: Results) -> str:
    """Tracking error of the closed loop beside what GRPO's entropy is from the same target without one."""
    rows = []
    for name, found in by_setting(read("targets")).get("16 updates", {}).items():
        error = report.mean_of(found, "tracking_error")
        means = summarise({name: found}, baseline=name)[0].means
        cells = [name, "–" if error is None else f"{error:.3f}", f"{means['final_entropy']:.3f}"]
        rows.append([*cells, f"{means['avg_at_k']:.3f}", str(len(found))])
    return markdown(["target, actuator", "mean abs. error / H_init", "final entropy", "accuracy", "seeds"], rows)


def equal_reward_table(read: Results) -> str:
    """Entropy and pass@8 where accuracy first reaches 0.6, paired with GRPO; Holm's correction over a setting."""
    rows = []
    for setting in ("16 updates", "L2, 16 updates"):
        methods = by_setting(read("losses")).get(setting, {})
        base = {metric: values(methods.get(BASELINE, []), metric) for metric in ("entropy_at_equal", "pass_at_equal")}
        found = []
        for name, runs in methods.items():
            mine = {metric: values(runs, metric) for metric in base}
            if name != BASELINE and len(mine["pass_at_equal"].keys() & base["pass_at_equal"].keys()) >= 8:
                entropy, _ = paired(mine["entropy_at_equal"], base["entropy_at_equal"])
                found.append((name, entropy, *paired(mine["pass_at_equal"], base["pass_at_equal"])))
        corrected = holm([p for *_, p in found])
        for (name, entropy, passed, _), p in zip(found, corrected, strict=True):
            if abs(entropy.mean) > 0.03:
                cells = [_level(setting), name, signed(entropy), f"{passed:+.4f}", str(passed.n), direction(passed, p)]
                rows.append(cells)
    return markdown(["setting", "method", "entropy − GRPO", "pass@8 − GRPO", "seeds", "pass@8"], rows)


def prediction_table(read: Results) -> str:
    """Agreement of each predictor with the measured change, mean and interval over methods and seeds."""
    rows = []
    for setting, methods in by_setting(read("prediction")).items():
        found = [row for rows_ in methods.values() for row in rows_]
        for predictor in ("token", "gradient", "adam", "step"):
            cells = [report.mean_of(found, f"{what}_{predictor}") for what in ("corr", "slope", "sign")]
            rows.append([setting, predictor, *("–" if c is None else f"{c:.2f}" for c in cells), str(len(found))])
    for name, found in by_setting(read("full_stack")).get(FULL[0], {}).items():
        cells = [report.mean_of(found, f"{what}_token") for what in ("corr", "slope", "sign")]
        shown = ["–" if c is None else f"{c:{spec}}" for c, spec in zip(cells, (".2f", ".0f", ".2f"), strict=True)]
        rows.append([f"L3, Adam, {name}", "token", *shown, str(len(found))])
    return markdown(["setting", "predictor", "correlation", "slope", "same sign", "runs"], rows)


def why_table(read: Results) -> str:
    """Accuracy at 64 updates under other optimizers, a column per method."""
    table = by_setting(read("why"))
    names = list(dict.fromkeys(name for methods in table.values() for name in methods))
    rows = []
    for setting, methods in table.items():
        found = {s.method: s for s in summarise(methods)}
        cells = [
            f"{found[n].means['avg_at_k']:.2f} ({found[n].collapsed}/{found[n].seeds})" if n in found else "–"
            for n in names
        ]
        rows.append([setting, *cells])
    return markdown(["optimizer", *names], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "claims": claims_table,
    "leaderboard": leaderboard_table,
    "random": study_table("random_rewards", "random"),
    "network": study_table("losses", "L2, 16 updates"),
    "network64": study_table("losses", "L2, 64 updates"),
    "full_stack": study_table("full_stack", FULL[0]),
    "regions": study_table("regions", "16 updates"),
    "flexible": study_table("flexible", "16 updates"),
    "discriminators": study_table("discriminators", "16 updates"),
    "targets": targets_table,
    "equal_reward": equal_reward_table,
    "prediction": prediction_table,
    "why": why_table,
}


def fill(text: str, read: Results) -> str:
    """``text`` with every table replaced by what the results say now."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]](read)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


# --- figures ---------------------------------------------------------------------------------------------------------


def random_figure(read: Results) -> Any:
    """Clip-Low/Clip-High fig. 3 as final entropy over each bound."""
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
    """Final entropy at 16 updates and accuracy at 64, over beta1 (x) and beta2 (y)."""
    grid = (0.0, 0.25, 0.5, 0.75, 1.0)
    result, axes = figures.figure(8.6, 3.4, 1, 2)
    panels = (
        ("16 updates", "final_entropy", "entropy, 16 updates"),
        ("64 updates", "avg_at_k", "accuracy, 64 updates"),
    )
    for ax, (setting, metric, title) in zip(axes[0], panels, strict=True):
        found = {s.method: s.means[metric] for s in summarise(by_setting(read("betas"))[setting])}
        cells = [[found[_beta_name(b1, b2)] for b1 in grid] for b2 in grid]
        image = [[c.mean for c in line] for line in cells]
        shown = ax.imshow(image, cmap="gray", origin="lower", aspect="auto")
        low, high = shown.get_clim()
        for j, line in enumerate(cells):
            for i, cell in enumerate(line):
                dark = (cell.mean - low) / (high - low) < 0.45
                ax.text(i, j, f"{cell.mean:.2f}\n±{cell.half:.2f}", ha="center", va="center", fontsize=7,
                        color="white" if dark else "black")  # fmt: skip
        ax.set_xticks(range(5), [f"{b:g}" for b in grid])
        ax.set_yticks(range(5), [f"{b:g}" for b in grid])
        ax.set(xlabel="beta1", ylabel="beta2")
        ax.set_title(title, fontsize=9.5)
        ax.grid(False)
    return result


def _beta_name(b1: float, b2: float) -> str:
    return f"CE-GPPO ({b1:g}, {b2:g})" if b1 or b2 else BASELINE


def schedules_figure(curves: dict[tuple[str, str], dict[str, Any]]) -> Any:
    """Entropy of ID, DID and OD minus GRPO's, over the run."""
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


def prediction_figure(rows: dict[str, list[tuple[float, float]]]) -> Any:
    """A panel per run: measured over predicted change, a point per rollout step."""
    result, axes = figures.figure(4.0 * len(rows), 3.0, 1, len(rows))
    for ax, (name, pairs) in zip(axes[0], rows.items(), strict=True):
        x, y = zip(*pairs, strict=True)
        ax.plot([1e6 * v for v in x], y, ".", color="black", markersize=5)
        ax.axhline(0, color="#777777", linewidth=0.8)
        ax.axvline(0, color="#777777", linewidth=0.8)
        ax.set(xlabel="predicted, 1e-6 nats", ylabel="measured, nats")
        found = prediction.agreement(pairs)
        ax.set_title(f"{name}: r = {found.correlation:.2f}" if found else name, fontsize=9)
    return result


def write(document: Path = DOCUMENT, folder: Path = FIGURES, root: Path = results.ROOT) -> list[Path]:
    """Regenerate the document's tables and all figures for which there are results; returns what was written."""
    read = reader(root)
    document.write_text(fill(document.read_text(encoding="utf-8"), read), encoding="utf-8")
    written = [document]
    makers: dict[str, tuple[str, Callable[[], Any]]] = {
        "leaderboard": ("losses", lambda: report.leaderboard(read("losses"))),
        "random_rewards": ("random_rewards", lambda: random_figure(read)),
        "prediction": (
            "full_stack",
            lambda: prediction_figure(
                {
                    line["method"]: [(x, y) for x, y in line["changes"]]
                    for line in results.read(root / "curves" / "full_stack.jsonl")
                    if line["seed"] == 0
                }
            ),
        ),
        "betas": ("betas", lambda: betas_figure(read)),
        "map_L1": ("map", lambda: report.map_figure(read("map"), "L1")),
        "map_L2": ("map", lambda: report.map_figure(read("map"), "L2")),
        "schedules": (
            "flexible",
            lambda: schedules_figure(report.merge_curves(results.read(root / "curves" / "flexible.jsonl"))),
        ),
    }
    for name, (study, make) in makers.items():
        level = name.removeprefix("map_")
        if any(level == name or row["level"] == level for row in read(study)):
            figures.save(make(), folder / f"{name}.png")
            written.append(folder / f"{name}.png")
    return written
