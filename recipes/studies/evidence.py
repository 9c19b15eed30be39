"""Generate the tables and figures of docs/evidence.md from the committed results.

The text is written by hand. A table is everything between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.studies import evidence_figures as draw
from recipes.studies import figures, report, results
from recipes.studies.claims import CLAIMS, FULL, decide
from recipes.studies.evidence_figures import Results
from recipes.studies.methods import BASELINE
from recipes.studies.results import Row
from recipes.studies.statistics import Interval, holm, interval, paired
from recipes.studies.summary import by_setting, direction, summarise, values

FIGURES = Path("docs/figures")
DOCUMENT = Path("docs/evidence.md")
PREDICTORS = ("token", "gradient", "adam", "step")
SHORT = {"final_entropy": "entropy", "avg_at_k": "accuracy", "pass_at_k": "pass@8"}


def reader(root: Path = results.ROOT) -> Results:
    """A function from study name to rows that reads each file once."""
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
    """All methods of L1, sorted by accuracy at many updates per batch."""
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
    """A function that makes the table of one setting: entropy, accuracy, pass@8, differences and verdicts."""

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


def staleness_table(read: Results) -> str:
    """Age of the trained tokens, tokens that an update cut, and what both cost in accuracy, paired with synchronous."""
    rows = []
    for found in by_setting(read("staleness")).values():
        for s in summarise(found):
            ages = [report.mean_of(found[s.method], name) for name in ("staleness", "cut_tokens")]
            age, cut = (0.0 if value is None else value.mean for value in ages)  # none: a synchronous run
            cells = [s.method, f"{age:.2f}", f"{100 * cut:.0f} %", f"{s.means['avg_at_k']:.3f}"]
            cells.append(signed(s.differences["avg_at_k"][0]) if "avg_at_k" in s.differences else "–")
            rows.append([*cells, f"{s.means['final_entropy']:.3f}", f"{s.collapsed}/{s.seeds}"])
    head = ["method", "age, steps", "tokens cut", "accuracy", "− GRPO", "entropy", "collapsed"]
    return markdown(head, rows)


def targets_table(read: Results) -> str:
    """Tracking error, final entropy and accuracy of the closed loop, per target and actuator."""
    rows = []
    for name, found in by_setting(read("targets")).get("16 updates", {}).items():
        error = report.mean_of(found, "tracking_error")
        means = summarise({name: found}, baseline=name)[0].means
        cells = [name, "–" if error is None else f"{error:.3f}", f"{means['final_entropy']:.3f}"]
        rows.append([*cells, f"{means['avg_at_k']:.3f}", str(len(found))])
    return markdown(["target, actuator", "mean abs. error / H_init", "final entropy", "accuracy", "seeds"], rows)


def equal_reward_table(read: Results) -> str:
    """Entropy and pass@8 where accuracy first reaches 0.6, paired with GRPO, with Holm's correction per setting."""
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
    """Agreement of each predictor with the measured change: mean and interval over methods and seeds."""
    rows = []
    for setting, methods in by_setting(read("prediction")).items():
        found = [row for rows_ in methods.values() for row in rows_]
        for predictor in PREDICTORS:
            cells = [report.mean_of(found, f"{what}_{predictor}") for what in ("corr", "slope", "sign")]
            rows.append([setting, predictor, *("–" if c is None else f"{c:.2f}" for c in cells), str(len(found))])
    for name, found in by_setting(read("full_stack")).get(FULL[0], {}).items():
        cells = [report.mean_of(found, f"{what}_token") for what in ("corr", "slope", "sign")]
        shown = ["–" if c is None else f"{c:{spec}}" for c, spec in zip(cells, (".2f", ".0f", ".2f"), strict=True)]
        rows.append([f"L3, Adam, {name}", "token", *shown, str(len(found))])
    return markdown(["setting", "predictor", "correlation", "slope", "same sign", "runs"], rows)


def why_table(read: Results) -> str:
    """Accuracy at 64 updates per batch for each optimizer, one column per method."""
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


def passes_table(read: Results) -> str:
    """Accuracy gain, step length and mean F A of the four passes over a batch, per optimizer and method."""
    rows = []
    for setting, methods in by_setting(read("passes")).items():
        for name, found in methods.items():

            def mean(key: str, number: int, found: list[Row] = found) -> Interval:
                return interval([row[key][number] for row in found])

            gains = [f"{100 * mean('pass_gain', i).mean:+.2f}" for i in range(4)]
            last = mean("pass_gain", 3)
            gains[3] += f" ± {100 * last.half:.2f}"
            ratio = interval([row["pass_step"][3] / row["pass_step"][0] for row in found])
            pulls = [f"{mean('pass_reward', i).mean:.2f} / {-mean('pass_penalty', i).mean:.2f}" for i in (0, 3)]
            rows.append([setting, name, *gains, f"{mean('pass_step', 0).mean:.1f}", f"{ratio:.2f}", *pulls])
    head = ["optimizer", "method", *(f"pass {i}" for i in range(1, 5)), "distance, pass 1", "pass 4 / pass 1"]
    return markdown([*head, "reward / penalty, pass 1", "pass 4"], rows)


def prediction_methods_table(read: Results) -> str:
    """Correlation of each predictor with the measured change, per method: mean and interval over runs."""
    settings = by_setting(read("prediction"))
    columns = [(setting, p) for setting in settings for p in (("gradient",) if "SGD" in setting else PREDICTORS[1:])]
    rows = []
    for name in dict.fromkeys(name for methods in settings.values() for name in methods):
        cells = [report.mean_of(settings[setting].get(name, []), f"corr_{p}") for setting, p in columns]
        rows.append([name, *("–" if c is None else f"{c:.2f}" for c in cells)])
    return markdown(["method", *(f"{setting}: {p}" for setting, p in columns)], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "claims": claims_table,
    "leaderboard": leaderboard_table,
    "random": study_table("random_rewards", "random"),
    "network": study_table("losses", "L2, 16 updates"),
    "network64": study_table("losses", "L2, 64 updates"),
    "full_stack": study_table("full_stack", FULL[0]),
    "staleness": staleness_table,
    "regions": study_table("regions", "16 updates"),
    "flexible": study_table("flexible", "16 updates"),
    "discriminators": study_table("discriminators", "16 updates"),
    "targets": targets_table,
    "equal_reward": equal_reward_table,
    "prediction": prediction_table,
    "prediction_methods": prediction_methods_table,
    "why": why_table,
    "passes": passes_table,
    "random_network": study_table("random_rewards", "L2, random"),
    "flexible64": study_table("flexible", "64 updates"),
}


def fill(text: str, read: Results) -> str:
    """``text`` with every table regenerated from the current results."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]](read)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def write(document: Path = DOCUMENT, folder: Path = FIGURES, root: Path = results.ROOT) -> list[Path]:
    """Regenerate the tables of the document and every figure that has results. Returns the written paths."""
    read = reader(root)
    document.write_text(fill(document.read_text(encoding="utf-8"), read), encoding="utf-8")
    written = [document]
    makers: dict[str, tuple[str, Callable[[], Any]]] = {
        "leaderboard": ("losses", lambda: draw.leaderboard(read("losses"))),
        "random_rewards": ("random_rewards", lambda: draw.random_figure(read)),
        "prediction": (
            "full_stack",
            lambda: draw.prediction_figure(results.read(root / "curves" / "full_stack.jsonl")),
        ),
        "full_stack": (
            "full_stack",
            lambda: draw.full_stack_figure(results.read(root / "curves" / "full_stack.jsonl")),
        ),
        "betas": ("betas", lambda: draw.betas_figure(read)),
        "map_L1": ("map", lambda: draw.map_figure(read("map"), "L1")),
        "map_L2": ("map", lambda: draw.map_figure(read("map"), "L2")),
        "schedules": (
            "flexible",
            lambda: draw.schedules_figure(report.merge_curves(results.read(root / "curves" / "flexible.jsonl"))),
        ),
    }
    for name, (study, make) in makers.items():
        level = name.removeprefix("map_")
        ready = any(level == name or row["level"] == level for row in read(study))
        if ready:
            figures.save(make(), folder / f"{name}.png")
            written.append(folder / f"{name}.png")
    return written
