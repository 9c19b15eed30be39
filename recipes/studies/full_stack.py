"""Level L3: studies that run `recipes.train` itself, with the Megatron learner and real rollouts.

All methods of a seed run before the next seed, so a study that is stopped early is still balanced. A finished run is
only read, and an unfinished run resumes. Each seed has its own warm start.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from recipes.studies import methods, prediction, results
from recipes.studies.engine import Method
from recipes.studies.methods import overrides

EDGE = 5  # steps averaged at the end


@dataclass(frozen=True, kw_only=True)
class FullStudy:
    """One results file. Every run is ``recipes.train`` with ``words``, the words of the method and the seed."""

    title: str
    question: str
    words: tuple[str, ...]
    methods: Mapping[str, Method]
    seeds: int
    eval_set: str
    k: int
    setting: str
    method_words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Method name -> additional words."""


def _stale(steps: int, *words: str) -> tuple[str, ...]:
    return (f"rollout.max_staleness={steps}", *words)


STALENESS = {"GRPO": ()} | {f"ahead {k}": _stale(k) for k in (1, 2, 4)}
# Two batches are decoded at a time: with one, the first batch would be complete before the second begins.
STALENESS |= {f"partial {k}": _stale(k, "rollout.partial=true", "rollout.max_num_seqs=512") for k in (1, 2, 4)}


FULL_STUDIES: dict[str, FullStudy] = {
    "full_stack": FullStudy(
        title="Headline methods on the full stack",
        question="Do the table's directions hold with Megatron-Core, text and shared weights, where clipping acts?",
        words=(
            "recipe=quickstart",
            "rollout.engine=local",
            "train.steps=60",
            "train.epochs=4",
            "train.entropy_probe_every=1",
            "run.report_every=0",
        ),
        methods={n: methods.LOSSES[n] for n in ("GRPO", "eps_low 0.05", "CE-GPPO (0, 1)")},
        seeds=10,
        eval_set="chain",
        k=8,
        setting="quick start, 4 epochs",
    ),
    "staleness": FullStudy(
        title="Staleness and partial rollouts",
        question="What do tokens that are 1, 2 or 4 steps old cost in reward, and what do partial rollouts save?",
        words=("recipe=quickstart", "rollout.engine=local", "train.steps=32", "train.tis_cap=2", "eval.every=32"),
        methods=dict.fromkeys(STALENESS, methods.LOSSES["GRPO"]),
        method_words=STALENESS,
        seeds=4,
        eval_set="chain",
        k=8,
        setting="quick start, 32 steps",
    ),
    "gpu": FullStudy(
        title="Headline methods on a GPU",
        question="Do the directions hold on SmolLM2-135M with vLLM and word problems?",
        words=(
            "recipe=smollm2_gsm8k",
            "train.steps=24",
            "train.epochs=4",
            "train.entropy_probe_every=1",
            "model.dtype=bfloat16",
            "rollout.dtype=bfloat16",
            "train.tis_cap=2",
            "rollout.agreement_limit=0.02",
            "eval.problems=64",
            "eval.n=8",
            "eval.k=[1,8]",
        ),
        methods={n: methods.LOSSES[n] for n in ("GRPO", "eps_low 0.05", "eps_high off", "CE-GPPO (0, 1)")},
        seeds=2,
        eval_set="one_step_problems",
        k=8,
        setting="SmolLM2-135M, 4 epochs",
    ),
}


# Test size, for a CPU: checks that the run of every method starts, trains, evaluates and can be read.
REHEARSAL = (
    "model.path=tiny",
    "model.warm_start.max_steps=1",
    "model.warm_start.min_steps=1",
    "model.warm_start.check_every=1",
    "model.warm_start.batch=2",
    "model.warm_start.check_problems=1",
    "model.dtype=float32",
    "data.name=chain",
    "data.template='{problem}'",
    "reward.name=random",
    "optim.lr=0.01",
    "rollout.engine=local",
    "rollout.dtype=float32",
    "rollout.prompts_per_step=2",
    "rollout.n=8",
    "train.steps=2",
    "train.mini_batch_prompts=1",
    "eval.problems=2",
    "run.report_every=0",
)


def rehearsal(study: FullStudy) -> FullStudy:
    """``study`` with all of its methods, two steps each, to test that it runs. The results have no meaning."""
    words = (*study.words, *REHEARSAL)
    return replace(study, words=words, seeds=1, eval_set="chain", setting=f"rehearsal of {study.setting}")


def run(
    name: str,
    study: FullStudy,
    *,
    root: Path = results.ROOT,
    runs: Path = Path("runs/studies"),
    seeds: int | None = None,
    minutes: float | None = None,
    report: Callable[[str], None] = print,
) -> list[results.Row]:
    """Run what the study's results file lacks, for at most ``minutes``. Returns all rows of the file."""
    path = root / f"{name}.jsonl"
    done = {(row["method"], row["seed"]) for row in results.read(path)}
    todo = [(s, m) for s in range(study.seeds if seeds is None else seeds) for m in study.methods if (m, s) not in done]
    begin = time.monotonic()
    for count, (seed, method) in enumerate(todo, 1):
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            report(f"{name}: the {minutes:g} minutes are over, {len(todo) - count + 1} runs are left")
            break
        run_dir = runs / name / f"{_slug(method)}-seed{seed}"
        words = [*study.words, *overrides(study.methods[method]), *study.method_words.get(method, ())]
        words += [f"seed={seed}", f"model.warm_start.seed={seed}", f"run.dir={run_dir}", f"run.name={name}"]
        failed, taken = False, None
        if not (run_dir / "hf").is_dir():  # exported at the end
            started = time.monotonic()
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            with (run_dir.parent / f"{run_dir.name}.log").open("a") as log:
                command = [sys.executable, "-m", "recipes.train", *words]
                failed = subprocess.run(command, stdout=log, stderr=log, check=False).returncode != 0
            taken = round((time.monotonic() - started) / 60, 1)
        row = {**_row(name, study, method, seed, run_dir, words, failed), "minutes": taken}
        results.append(root / "curves" / path.name, [curve(method, seed, results.read(run_dir / "metrics.jsonl"))])
        results.append(path, [row])
        elapsed = time.monotonic() - begin
        report(
            f"[{count}/{len(todo)}] {method}, seed {seed}: avg@{study.k} {row['avg_at_k']}, entropy "
            f"{row['final_entropy']}{', FAILED' if failed else ''}; {elapsed:.0f} s, "
            f"about {elapsed / count * (len(todo) - count):.0f} s left"
        )
    return results.read(path)


def _row(
    name: str, study: FullStudy, method: str, seed: int, run_dir: Path, words: list[str], failed: bool
) -> results.Row:
    """The results row of a run. A run that ended with an error counts as collapsed and keeps its measurements."""
    path = run_dir / "metrics.jsonl"
    metrics = results.read(path)
    row = {
        "study": name,
        "method": method,
        "seed": seed,
        "level": "L3",
        "setting": study.setting,
        "failed": failed,
        **summary(metrics, study.eval_set, study.k, failed),
        **ages(metrics),
        "k": study.k,
        "command": "python -m recipes.train " + " ".join(w for w in words if not w.startswith("run.")),
        "machine": results.machine(),
        "date": time.strftime("%Y-%m-%d", time.localtime(path.stat().st_mtime if metrics else None)),
    }
    return row


def ages(metrics: list[results.Row]) -> results.Row:
    """Mean age of trained tokens in steps, and mean number of tokens generated before an update cut their response.

    A trainer that restarts cut responses would discard the latter. {} for a run that trained only on new tokens.
    """
    found = {name: [row.get(f"rollout/{name}", 0.0) for row in metrics] for name in ("staleness", "cut_tokens")}
    means = {name: round(sum(values) / max(len(values), 1), 5) for name, values in found.items()}
    return means if means["staleness"] else {}


def summary(metrics: list[results.Row], eval_set: str, k: int, failed: bool = False) -> results.Row:
    """Summarise a run's ``metrics.jsonl`` under the column names of the results files."""

    def series(key: str) -> list[float]:
        return [row[key] for row in metrics if row.get(key) is not None]

    def mean(values: list[float]) -> float | None:
        return round(sum(values) / len(values), 5) if values else None

    entropy, reward = series("actor/entropy"), series("critic/rewards/mean")
    before, after = series(f"val-before/{eval_set}/avg@{k}"), series(f"val-core/{eval_set}/avg@{k}")
    passed = series(f"val-core/{eval_set}/pass@{k}")
    smooth = [sum(reward[i : i + EDGE]) / EDGE for i in range(len(reward) - EDGE + 1)]
    below_start = bool(before and after and after[-1] < before[0])
    row: results.Row = {
        "steps": len(metrics),
        "start_entropy": round(entropy[0], 4) if entropy else None,
        "final_entropy": mean(entropy[-EDGE:]),
        "entropy_auc": mean(entropy),
        "start_avg_at_k": round(before[0], 4) if before else None,
        "avg_at_k": round(after[-1], 4) if after else None,
        "pass_at_k": round(passed[-1], 4) if passed else None,
        "final_reward": mean(reward[-EDGE:]),
        "clip_low": mean(series("actor/pg_clipfrac_low")),
        "clip_high": mean(series("actor/pg_clipfrac_high")),
        "max_abs_dp": max(series("rollout_agreement/abs_dp_mean"), default=None),
        "collapsed": failed or below_start or bool(smooth and smooth[-1] < 0.5 * max(smooth)),
    }
    return row | entropy_agreement(metrics)


CURVES = {
    "entropy": "actor/entropy",
    "reward": "critic/rewards/mean",
    "clip_low": "actor/pg_clipfrac_low",
    "clip_high": "actor/pg_clipfrac_high",
}


def curve(method: str, seed: int, metrics: list[results.Row]) -> results.Row:
    """The curves row of a run: one value per step, and pairs of predicted and measured change of entropy."""
    pairs = prediction.changes(_series(metrics))
    line: results.Row = {"method": method, "seed": seed, "changes": [[_short(x) for x in pair] for pair in pairs]}
    return line | {name: [_short(row.get(key)) for row in metrics] for name, key in CURVES.items()}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _series(metrics: list[results.Row]) -> dict[str, list[tuple[float, float]]]:
    keys = {key for row in metrics for key in row}
    return {key: [(row["step"], row[key]) for row in metrics if row.get(key) is not None] for key in keys}


def entropy_agreement(metrics: list[results.Row]) -> results.Row:
    """Agreement of predicted and measured change of entropy over a run's steps; {} if the run is too short."""
    found = prediction.agreement(prediction.changes(_series(metrics)))
    if found is None:
        return {}
    numbers = {"corr": found.correlation, "slope": found.slope, "sign": found.same_sign}
    return {f"{name}_token": round(value, 4) for name, value in numbers.items()}


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "_" for c in name)
