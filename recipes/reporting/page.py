"""The HTML report of one or several runs: `python -m recipes.report RUN_DIR [RUN_DIR ...]`.

Reads what a run leaves behind (`metrics.jsonl`, `config.yaml`, `samples.jsonl`) and writes a self-contained
`report.html`: no request to anywhere, no absolute path, no secret. Its charts are pictures that its script replaces by
interactive ones. Several directories give an overlay of the runs. Model output is hostile text: the template escapes
everything, the script sets it as text, control and bidirectional characters are made visible, and a
Content-Security-Policy allows the page's own two scripts by their hashes and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from recipes.reporting import charts
from recipes.reporting.runs import Run, axes_of, is_number, load_run

SAMPLES_SHOWN = 6
STEPS_SHOWN = 60  # steps whose samples can be chosen; evenly spread when a run has more
POINTS = 1500  # of a line; a screen shows no more
UPLOT = "uplot-1.6.32.min"  # chart library, MIT: uplot-LICENSE.txt
_HERE = Path(__file__).parent
TEXT_SHOWN = 1500  # characters of a completion
EDGE = 5  # steps averaged for "start" and "end"
_SECRET = re.compile(r"(^|[_-])(api_?key|secret|password|passwd|credentials?|token|auth)$", re.IGNORECASE)
_USER = re.compile(r"://[^/@\s]+@")  # user and password of an address
_ABSOLUTE = re.compile(r"(?:file:/+|(?<![\w.:/~<])/|~/)(?:[^\s/:,;'\"]+/)*(?P<name>[^\s/:,;'\"]+)/?")


def scrub(value: Any, key: str = "") -> Any:
    """A config without secrets and without absolute paths, of which only the last part is kept."""
    if isinstance(value, dict):
        return {k: scrub(v, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [scrub(v, key) for v in value]
    if not isinstance(value, (str, int, float, bool, type(None))):
        value = str(value)  # dates and bytes are YAML too
    if isinstance(value, str):
        return "***" if value and _SECRET.search(key) else _ABSOLUTE.sub(r"…/\g<name>", _USER.sub("://***@", value))
    return value


def visible(text: Any) -> str:
    """Text with control and direction-changing characters as escapes. Long text is truncated."""
    text = str(text)
    cut = f"\n… {len(text) - TEXT_SHOWN} more characters" if len(text) > TEXT_SHOWN else ""
    shown = (c if c == "\n" or unicodedata.category(c)[0] != "C" else f"\\u{ord(c):04x}" for c in text[:TEXT_SHOWN])
    return "".join(shown) + cut


def edges(values: list[float]) -> tuple[float, float]:
    """Means over the first and the last few values (fewer than EDGE when the run is short)."""
    n = max(1, min(EDGE, len(values) // 3))
    return sum(values[:n]) / n, sum(values[-n:]) / n


def number(value: float, digits: int = 3) -> str:
    """Three significant digits, thousands separated, no exponent for everyday sizes."""
    if value == 0 or not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def time_shares(run: Run) -> list[dict[str, Any]]:
    """Mean seconds per step of each phase and its share of the step; "other" is the rest."""
    total = run.values("timing_s/step")
    steps = len(total) or run.steps()
    means = {name: sum(v for _, v in pairs) / steps for name, pairs in charts.phases(run.series).items()}
    step = sum(total) / len(total) if total else sum(means.values())
    means["other"] = max(0.0, step - sum(means.values()))
    whole = sum(means.values())
    return [
        {"name": name, "seconds": f"{s:.2g} s", "percent": 100 * s / whole, "index": i}
        for i, (name, s) in enumerate(means.items())
        if whole and s / whole >= 0.005
    ]


def tiles(run: Run) -> list[dict[str, str]]:
    """Headline numbers: label, value, small print."""
    out = []
    for key in sorted(run.series):
        match, pairs = charts.EVALUATION.match(key), run.series[key]
        if match and match["kind"] == "avg":
            other = run.values(key.replace("/avg@", "/pass@"))
            small = f"{match['set']}, avg@{match['k']} on held-out problems"
            if other:
                small += f"; pass@{match['k']} {other[0]:.1%} → {other[-1]:.1%}"
            low, high = run.values(f"{key}/low"), run.values(f"{key}/high")
            if low and high:
                small += f"; 95 % interval {low[-1]:.1%} – {high[-1]:.1%}"
            value = f"{pairs[0][1]:.1%} → {pairs[-1][1]:.1%}" if len(pairs) > 1 else f"{pairs[0][1]:.1%}"
            out.append({"label": "Accuracy", "value": value, "small": small})
    if not out:
        out.append({"label": "Accuracy", "value": "–", "small": "this run made no evaluation"})
    for label, key, unit in (
        ("Entropy", "actor/entropy", "nats per token"),
        ("Training reward", "critic/rewards/mean", "mean of a step"),
    ):
        if values := run.values(key):
            start, end = edges(values)
            out.append({"label": label, "value": f"{number(start)} → {number(end)}", "small": unit + ", start → end"})
    if values := run.values("perf/throughput"):
        middle = sorted(values)[len(values) // 2]
        small = "tokens per second, median step"
        for part in ("rollout", "learner"):
            if alone := run.values(f"perf/{part}_tokens_per_s"):
                small += f"; {part} alone {number(sorted(alone)[len(alone) // 2])}"
        if mfu := run.values("perf/mfu"):
            small += f"; MFU {sorted(mfu)[len(mfu) // 2]:.1%}"
        out.append({"label": "Throughput", "value": number(middle), "small": small})
    if values := run.values("timing_s/step"):
        small = f"mean of {len(values)} steps, {sum(values) / 60:.1f} min in all"
        out.append({"label": "Time per step", "value": f"{number(sum(values) / len(values), 2)} s", "small": small})
    return out


def pick_samples(run: Run) -> list[dict[str, Any]]:
    """The first sample of the first few prompts of the earliest and the latest step: not chosen by outcome."""
    steps = sorted({row["step"] for row in run.samples if "step" in row})
    out = []
    for title, step in zip(("Early", "Late"), dict.fromkeys([*steps[:1], *steps[-1:]]), strict=False):
        first: dict[str, dict[str, Any]] = {}
        for row in run.samples:
            if row.get("step") == step:
                first.setdefault(str(row.get("prompt")), row)
        rows = [_sample(row) for row in list(first.values())[:SAMPLES_SHOWN]]
        out.append({"title": f"{title}: step {step}", "rows": rows})
    return out


def _signed(value: Any) -> str:
    return f"{value:+.2f}" if isinstance(value, (int, float)) else "–"


def all_samples(run: Run) -> dict[int, list[dict[str, Any]]]:
    """Samples by step, of at most STEPS_SHOWN steps."""
    steps = sorted({int(row["step"]) for row in run.samples})
    if len(steps) > STEPS_SHOWN:
        steps = sorted({steps[round(i * (len(steps) - 1) / (STEPS_SHOWN - 1))] for i in range(STEPS_SHOWN)})
    found: dict[int, list[dict[str, Any]]] = {step: [] for step in steps}
    for row in run.samples:
        if row["step"] in found and len(found[row["step"]]) < SAMPLES_SHOWN:
            found[row["step"]].append(_sample(row) | _tokens(row))
    return found


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **{k: visible(row.get(k, "")) for k in ("prompt", "response", "gold")},
        "reward": _signed(row.get("reward")),
        "advantage": _signed(row.get("advantage")),
        "good": isinstance(row.get("reward"), (int, float)) and row["reward"] > 0,
    }


def _tokens(row: dict[str, Any]) -> dict[str, Any]:
    """The response token by token with the numbers that the run wrote for each; clipping only where it was traced."""
    tokens = row.get("tokens")
    if not isinstance(tokens, list):
        return {}

    def numbers(*names: str) -> dict[str, list[float]]:
        found = {name: row.get(name) for name in names}
        good = (isinstance(v, list) and len(v) == len(tokens) and all(map(is_number, v)) for v in found.values())
        return found if all(good) else {}  # type: ignore[return-value]

    known = numbers("entropy", "logp")
    if not known:
        return {}
    return {"tokens": [visible(token) for token in tokens]} | known | numbers("ratio", "clip_side", "gradient_weight")


def facts(config: dict[str, Any], engine: str = "") -> list[str]:
    """The main settings, shown beside the title, and the engine that ran."""
    keys = "loss.name model.path data.path optim.lr seed rollout.engine parallel.tp parallel.pp parallel.cp".split()
    out = []
    for dotted in keys:
        value: Any = config
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if dotted == "rollout.engine" and engine:
            value = visible(engine)
        if isinstance(value, (str, int, float)) and value != "":
            out.append(f"{dotted.removesuffix('.name').removesuffix('.path').split('.')[-1]} {value}")
    return out


def _unique_names(runs: list[Run]) -> None:
    """Names of runs; equal directory names get a number, so that legends are unique."""
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            run.name += f" ({seen[run.name]})"


def render(runs: list[Run], *, live: bool = False) -> str:
    """The page as one HTML string. ``live``: it asks its own server for new numbers."""
    _unique_names(runs)
    overlay = {run.name: run.series for run in runs}
    main, used = charts.main_charts(overlay)
    others = charts.other_charts(overlay, used)
    configs = [scrub(run.config) for run in runs]
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    scripts = [(_HERE / name).read_text(encoding="utf-8") for name in (f"{UPLOT}.js", "report.js")]
    return environment.get_template("page.html.j2").render(
        title=" · ".join(run.name for run in runs),
        live=live,
        uplot_css=Markup((_HERE / f"{UPLOT}.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        digests=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
        data=Markup(embedded(numbers(runs, [*main, *others]))),
        runs=[
            {
                "name": run.name,
                "index": i % charts.COLOURS,
                "steps": run.steps(),
                "facts": facts(config, run.engine),
                "notes": run.notes,
                "tiles": tiles(run),
                "shares": time_shares(run),
                "samples": pick_samples(run),
                "browsable": bool(run.samples),
                "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
            }
            for i, (run, config) in enumerate(zip(runs, configs, strict=True))
        ],
        differences=config_differences(configs) if len(runs) > 1 else [],
        charts=[_figure(i, chart) for i, chart in enumerate(main)],
        others=[_figure(len(main) + i, chart) for i, chart in enumerate(others)],
    )


def numbers(runs: list[Run], drawn: list[charts.Chart]) -> dict[str, Any]:
    """The data of the page's script: axes of every run, lines of every chart, samples by run and step."""
    return {
        "runs": [axes_of(run.series) for run in runs],
        "charts": [{"title": c.title, "percent": c.percent, "lines": [_thinned(x) for x in c.lines]} for c in drawn],
        "samples": [all_samples(run) for run in runs],
    }


def _thinned(line: dict[str, Any]) -> dict[str, Any]:
    """At most POINTS points of a line, rounded. Each is of a real step: the script looks up its tokens and hours."""
    size = -(-len(line["points"]) // POINTS)

    def short(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(step, float(f"{value:.6g}")) for step, value in pairs[:: size or 1]]

    return {key: short(value) if key in ("points", "low", "high") else value for key, value in line.items()}


def embedded(value: Any) -> str:
    """JSON that is safe inside a script element: tags, comments and line separators are escaped."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _figure(index: int, chart: charts.Chart) -> dict[str, Any]:
    unit = " %" if chart.percent else ""
    ends = [
        (line["label"], *(value * (100 if chart.percent else 1) for _, value in line["points"])) for line in chart.lines
    ]
    words = [f"{label + ': ' if label else ''}{number(v[0])}{unit} to {number(v[-1])}{unit}" for label, *v in ends if v]
    return chart._asdict() | {"index": index, "svg": Markup(chart.svg), "summary": "; ".join(words)}


def config_differences(configs: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(dotted key, value in each run) of all keys whose values are not the same everywhere."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
        out: dict[str, str] = {}
        for key, value in values.items():
            out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
        return out

    tables = [flat(config) for config in configs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [table.get(key, "–") for table in tables]) for key in keys if key not in ("run.dir", "run.name")]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def write_report(run_dir: Path, *others: Path, out: Path | None = None) -> Path:
    """Write the report of a run, or of several overlaid, and return where.

    Args:
        run_dir: a run directory with at least ``metrics.jsonl``.
        others: further runs to compare with it.
        out: the file to write; by default ``report.html`` in the run directory (one run) or ``comparison.html`` in the
            current directory (several).

    Raises:
        ValueError: a directory holds no usable metrics.
    """
    run_dirs = [Path(run_dir), *map(Path, others)]
    target = out or (Path("comparison.html") if others else run_dirs[0] / "report.html")
    page = render([load_run(path) for path in run_dirs])
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    if target.is_dir():
        raise ValueError(f"--out {target} is a directory; give the name of a file")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, target)  # a reader never sees half a page
    return target
