"""Predicted against measured change of entropy over the steps of a real run, from its metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recipes.studies.statistics import wilson

Series = Mapping[str, Sequence[tuple[float, float]]]


def changes(series: Series) -> list[tuple[float, float]]:
    """(predicted, measured) change of mean entropy of every rollout step that has both, nats.

    Predicted: ``theory/entropy_slope`` times the number of updates and the learning rate. This is first order, and
    assumes plain gradient descent and separate logits for every token. With Adam and shared weights its sign and
    correlation are meaningful, its size is not. Measured: on the same tokens where the run probed it
    (``train.entropy_probe_every``), else the difference to the next step's batch, which has other tokens.
    """
    table = {key: dict(pairs) for key, pairs in series.items()}
    probed, entropy = table.get("theory/entropy_change_same_tokens", {}), table.get("actor/entropy", {})
    found = []
    for step, slope in sorted(table.get("theory/entropy_slope", {}).items()):
        updates, lr = table.get("actor/updates", {}).get(step), table.get("actor/lr", {}).get(step)
        measured = probed.get(step)
        if measured is None and not probed and step in entropy and step + 1 in entropy:
            measured = entropy[step + 1] - entropy[step]
        if measured is not None and updates is not None and lr is not None:
            found.append((slope * updates * lr, measured))
    return found


@dataclass(frozen=True)
class Agreement:
    """Agreement of predicted and measured changes in one run. The 95 % intervals assume independent steps."""

    steps: int
    correlation: float
    correlation_interval: tuple[float, float]
    slope: float
    """Least squares through the origin: measured = slope x predicted."""
    same_sign: float
    same_sign_interval: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.correlation_interval
        first, last = self.same_sign_interval
        return (
            f"correlation {self.correlation:.2f} ({low:.2f} to {high:.2f}), slope {self.slope:.3g}, same sign in "
            f"{self.same_sign:.0%} ({first:.0%} to {last:.0%}) of {self.steps} steps"
        )


def agreement(pairs: Sequence[tuple[float, float]]) -> Agreement | None:
    """Agreement of (predicted, measured) pairs, with Fisher's interval of the correlation.

    None for fewer than 5 steps, or if one side does not vary.
    """
    n = len(pairs)
    if n < 5:
        return None
    mean_x, mean_y = (math.fsum(pair[i] for pair in pairs) / n for i in (0, 1))
    xx, yy = (math.fsum((pair[i] - m) ** 2 for pair in pairs) for i, m in ((0, mean_x), (1, mean_y)))
    if xx == 0 or yy == 0:
        return None
    r = math.fsum((x - mean_x) * (y - mean_y) for x, y in pairs) / math.sqrt(xx * yy)
    z, half = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r))), 1.959964 / math.sqrt(n - 3)
    same = sum((x > 0) == (y > 0) for x, y in pairs)
    slope = math.fsum(x * y for x, y in pairs) / math.fsum(x * x for x, _ in pairs)
    return Agreement(n, r, (math.tanh(z - half), math.tanh(z + half)), slope, same / n, wilson(same, n))
