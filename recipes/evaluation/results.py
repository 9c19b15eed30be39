"""Results of one set from its completions: estimates with intervals, counts and per-problem rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from recipes.data.evalsets import EvalSet
from recipes.loop.estimators import Estimate
from recipes.loop.evaluation import estimate, flat_metrics


@dataclass
class SetResult:
    """One evaluated set. ``rows`` come from `recipes.evaluation.log`."""

    evaluated: EvalSet
    estimates: dict[str, Estimate]
    rows: list[dict[str, Any]]
    truncated: int  # responses that hit the length limit
    failures: Counter[str]  # responses that could not be judged, by status
    unanswered: int  # responses without an answer that the verifier could read
    tokens: int  # of all responses
    seconds: float  # of this call; 0 if all completions existed already

    @property
    def responses(self) -> int:
        return sum(len(row["samples"]) for row in self.rows)

    @property
    def title(self) -> str:
        """One line with the counts of the evaluation."""
        text = f"{self.evaluated.name}: {self.evaluated.summary}, {self.evaluated.protocol.n} samples each"
        text += f", {self.truncated} of {self.responses} responses truncated"
        if self.failures:
            text += f", {sum(self.failures.values())} not judged"
        return text

    @property
    def warnings(self) -> list[str]:
        """Reasons why the numbers may be unreliable."""
        found = [self.evaluated.note] if self.evaluated.note else []
        reward = self.evaluated.protocol.reward
        if self.unanswered == self.responses:
            found.append(
                f"no response of {self.evaluated.name} has an answer that reward.name={reward} can read: is it the "
                "right verifier for these problems and this template?"
            )
        elif self.truncated > self.responses / 10:
            share = self.truncated / self.responses
            found.append(
                f"{share:.0%} of the responses to {self.evaluated.name} are cut off at "
                f"{self.evaluated.protocol.max_tokens} tokens and mostly count as wrong: raise eval.max_tokens"
            )
        if self.failures:
            listed = ", ".join(f"{status} {number}" for status, number in self.failures.items())
            found.append(f"{sum(self.failures.values())} responses could not be judged and count as wrong: {listed}")
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything except the completions."""
        return {
            "set": self.evaluated.name,
            "file": self.evaluated.origin,
            "counts": {**self.evaluated.counts, "responses": self.responses, "truncated": self.truncated}
            | {"unanswered": self.unanswered, "not_judged": dict(self.failures)},
            "protocol": asdict(self.evaluated.protocol),
            "estimates": {name: asdict(estimate) for name, estimate in self.estimates.items()},
            "response_tokens": {"total": self.tokens, "mean": self.tokens / max(self.responses, 1)},
            "seconds": round(self.seconds, 1),
            "warnings": self.warnings,
            "problems": [
                {"id": row["id"], "correct": sum(s["correct"] for s in row["samples"]), "n": len(row["samples"])}
                for row in self.rows
            ],
        }

    def metrics(self) -> dict[str, float]:
        """Flat metrics named ``<set>/<estimate>``, as in training logs."""
        return flat_metrics(
            self.evaluated.name, self.estimates, len(self.rows), self.truncated / max(self.responses, 1)
        )


def make_result(evaluated: EvalSet, rows: Sequence[dict[str, Any]], seconds: float) -> SetResult:
    """The result of a set whose problems are all answered."""
    outcomes = [[bool(sample["correct"]) for sample in row["samples"]] for row in rows]
    answers = [[sample["answer"] for sample in row["samples"]] for row in rows]
    samples = [sample for row in rows for sample in row["samples"]]
    return SetResult(
        evaluated,
        estimate(outcomes, answers, evaluated.protocol.k),
        list(rows),
        truncated=sum(sample["finish"] == "length" for sample in samples),
        failures=Counter(sample["status"] for sample in samples if sample["status"] != "ok"),
        unanswered=sum(not sample["answer"] for sample in samples),
        tokens=sum(sample["tokens"] for sample in samples),
        seconds=seconds,
    )
