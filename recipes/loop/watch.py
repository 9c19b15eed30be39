"""Warnings, while a run goes on, that it learns nothing or that its policy has collapsed.

A step gives no signal when nothing was trained, when all rewards of the batch are equal and advantages are relative to
the group mean, or when every gradient was exactly zero. An entropy near 0 means a policy that always gives the same
response; an entropy near ln V (V: vocabulary size) means a uniform one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from configs.schema import Config

WARN_AFTER = 3  # steps in a row; one alone happens with small batches
ENTROPY_FLOOR = 1e-3  # nats per token
ENTROPY_TOP = 0.98  # of ln V


class Watch:
    """Checks the lines of ``metrics.jsonl``, one after the other."""

    def __init__(self, config: Config, vocab_size: int | None = None) -> None:
        self._config, self._vocab_size = config, vocab_size
        self._silent = 0
        self._runs: dict[str, int] = {}
        self._texts: dict[str, str] = {}
        self.stalled = ""

    def observe(self, values: Mapping[str, Any]) -> list[str]:
        """Warnings for a step's line. Sets ``stalled`` to the reason when the run should stop."""
        reason = self.no_signal(values)
        self._silent = self._silent + 1 if reason else 0
        limit = self._config.train.stop_after_silent_steps
        if limit and self._silent >= limit:
            self.stalled = f"no learning signal in {self._silent} steps in a row: {reason}"
        found = self._repeated("signal", reason, "no learning signal in the last {n} steps: " + reason)
        entropy = values.get("actor/entropy")
        if isinstance(entropy, float):
            low = entropy < ENTROPY_FLOOR
            text = f"entropy {entropy:.2g} nats in the last {{n}} steps: the policy always gives the same response"
            found += self._repeated("low", low, text)
            top = math.log(self._vocab_size) if self._vocab_size else math.inf
            text = (
                f"entropy {entropy:.3g} nats in the last {{n}} steps, and ln V is {top:.3g}: the policy is near uniform"
            )
            found += self._repeated("high", entropy > ENTROPY_TOP * top, text)
        return found

    def no_signal(self, values: Mapping[str, Any]) -> str:
        """The reason why a step trained nothing; empty if it did train."""
        if not values.get("rollout/samples", 1):
            return "no group had a difference in reward, so nothing was trained (advantage.drop_uniform_groups)"
        if values.get("critic/rewards/std") == 0 and self._config.advantage.name != "gae":
            reward = values.get("critic/rewards/mean", math.nan)
            hint = "the problems are too hard, or the verifier does not read the answers" if reward <= 0 else ""
            hint = hint or "the problems are too easy, or the verifier accepts anything"
            return f"all rewards are {reward:g}; {hint}"
        if values.get("actor/grad_norm") == 0:
            return "every gradient is zero: all advantages are 0, or the loss or the selection drops every token"
        return ""

    def at_end(self) -> list[str]:
        """Warnings for a run that ends with an entropy at its limit, but too early for `observe` to have said so."""
        late = [kind for kind in ("low", "high") if 0 < self._runs.get(kind, 0) < WARN_AFTER]
        return [f"warning: {self._texts[kind].format(n=self._runs[kind])}" for kind in late]

    def _repeated(self, kind: str, bad: object, text: str) -> list[str]:
        """The warning when ``bad`` has lasted WARN_AFTER steps, and again after 10 and 100 times as many."""
        count = self._runs[kind] = self._runs.get(kind, 0) + 1 if bad else 0
        self._texts[kind] = text
        due = WARN_AFTER
        while due < count:
            due *= 10
        return [f"warning: {text.format(n=count)}"] if bad and count == due else []
