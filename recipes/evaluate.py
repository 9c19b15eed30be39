"""Estimators of accuracy from n samples per problem: avg@k, pass@k and their uncertainty. Pure, but for the command:

`python -m recipes.evaluate model.path=DIR [data.name=jsonl data.path=FILE reward.name=math] [eval.n=8 eval.k=[1,8]]`
evaluates a Hugging Face directory on held-out problems with the same engine, prompts and verifier as training.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

Outcomes = Sequence[Sequence[bool]]  # [problem][sample]: was the sample correct?


def avg_at_k(outcomes: Outcomes) -> list[float]:
    """Share of correct samples of each problem; the mean over problems is avg@k with k samples per problem."""
    if not outcomes or not all(outcomes):
        raise ValueError("avg@k needs at least one problem and one sample per problem")
    return [sum(samples) / len(samples) for samples in outcomes]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, include one of the c correct ones.

    ``1 - C(n-c, k) / C(n, k)``: the unbiased estimator of pass@k (Chen et al. 2021, eq. 1), in exact integers.
    Raises ``ValueError`` unless ``0 <= c <= n`` and ``1 <= k <= n``.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} with {c} correct of {n} samples is undefined: it needs 0 <= c <= n and 1 <= k <= n")
    return 1 - comb(n - c, k) / comb(n, k)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems with a bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    statistic: Callable[..., np.ndarray] = np.mean,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of per-problem ``values``, resampling problems.

    It says how far the number could move with other problems of the same kind; sampling noise within a problem is
    part of the values already. ``statistic`` takes ``(array, axis=1)``. Deterministic in ``seed``.
    """
    if not values:
        raise ValueError("a bootstrap interval needs at least one problem")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistic(array[picks], axis=1), [tail, 1 - tail])
    return float(low), float(high)


def summarise(outcomes: Outcomes, ks: Sequence[int], *, seed: int = 0) -> dict[str, Estimate]:
    """``avg@n`` and ``pass@k`` for every k in ``ks``, each with its 95 % interval over problems.

    All problems must have the same number n of samples, and every k at most n.
    """
    counts = {len(samples) for samples in outcomes}
    if len(counts) != 1:
        raise ValueError(f"all problems need the same number of samples, got {sorted(counts)}")
    n = counts.pop()
    per_problem = {f"avg@{n}": avg_at_k(outcomes)}
    for k in ks:
        per_problem[f"pass@{k}"] = [pass_at_k(n, sum(samples), k) for samples in outcomes]
    return {
        name: Estimate(float(np.mean(values)), *bootstrap_interval(values, seed=seed))
        for name, values in per_problem.items()
    }


def main(argv: Sequence[str]) -> int:
    """Print the estimates as a table, then as one JSON line."""
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from configs.load import load_config
    from recipes.collect import Collector
    from recipes.launch import model_location, prepare_model

    try:
        config = load_config(argv)
        model_dir = model_location(config)
        prepare_model(config, model_dir)
        with tempfile.TemporaryDirectory() as logs:
            collector = Collector(config, model_dir, Path(logs))
            try:
                collector.serve(model_dir)
                metrics = collector.evaluate(0)["metrics"]
            finally:
                collector.close()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table(title=f"{model_dir.name}: {config.eval.problems} problems, {config.eval.n} samples each")
    for column in ("metric", "mean", "95 % interval over problems"):
        table.add_column(column)
    for name in (key for key in metrics if not key.endswith(("/low", "/high"))):
        table.add_row(name, f"{metrics[name]:.3f}", f"{metrics[name + '/low']:.3f} - {metrics[name + '/high']:.3f}")
    Console().print(table)
    print(json.dumps(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
