"""Rewards of a configuration: one verifier, or several with weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from configs.schema import RewardConfig
from recipes.rewards.custom import NAME
from recipes.rewards.pool import RewardPool, Scorer, make_scorer
from recipes.rewards.types import OK, RewardItem, RewardResult
from recipes.rewards.verifiers import make_verifier

_KEYS = ("name", "weight", "params", "timeout_s", "memory_mb")


@dataclass
class Term:
    """One verifier with its weight and limits."""

    name: str
    weight: float = 1.0
    params: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 1.5
    memory_mb: int = 2048


def reward_terms(reward: RewardConfig) -> list[Term]:
    """``reward.terms``, or the one verifier of ``reward.name``. Raises ValueError naming the key that is wrong."""
    limits: dict[str, Any] = {"timeout_s": reward.timeout_s, "memory_mb": reward.memory_mb}
    if not reward.terms:
        return [Term(reward.name, 1.0, dict(reward.params), **limits)]
    terms = []
    for index, given in enumerate(reward.terms):
        where = f"reward.terms[{index}]"
        if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
            raise ValueError(f"{where}={given} must be a mapping such as {{name: math, weight: 1.0}}")
        if unknown := sorted(set(given) - set(_KEYS)):
            raise ValueError(f"{where}.{unknown[0]} is unknown: a term has {', '.join(_KEYS)}")
        term = Term(**{**limits, **given, "params": dict(given.get("params") or {})})
        for key in ("weight", "timeout_s", "memory_mb"):
            value = getattr(term, key)
            finite = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
            if not finite or (key != "weight" and value <= 0):
                raise ValueError(
                    f"{where}.{key}={value} must be a {'finite' if key == 'weight' else 'positive'} number"
                )
        terms.append(term)
    if len({term.name for term in terms}) < len(terms):
        raise ValueError("reward.terms names a verifier twice; add its weights up in one term")
    return terms


def check_reward(reward: RewardConfig, *, load: bool = False) -> None:
    """Refuse unknown verifiers and parameters. ``load``: import functions of the user's own, in their sandbox."""
    for term in reward_terms(reward):
        make_verifier(term.name, **term.params)
        if load and NAME.fullmatch(term.name):
            with RewardPool(term.name, term.params, timeout_s=term.timeout_s, memory_mb=term.memory_mb) as pool:
                pool.start()


def scorer_of(reward: RewardConfig) -> Scorer:
    """The scorer of a run."""
    terms = reward_terms(reward)
    scorers = [
        make_scorer(
            term.name,
            term.params,
            workers=reward.workers,
            timeout_s=term.timeout_s,
            memory_mb=term.memory_mb,
            failure_score=reward.failure_score,
        )
        for term in terms
    ]
    return scorers[0] if len(terms) == 1 and terms[0].weight == 1.0 else WeightedScorer(terms, scorers)


def term_means(reward: RewardConfig, scores: Sequence[tuple[float, ...]]) -> dict[str, float]:
    """Mean score of each of several terms before weighting, by name as logged; empty for a reward of one term."""
    names = [term.name.replace(":", ".") for term in reward_terms(reward)]
    columns = list(zip(*scores, strict=True))
    return {name: sum(column) / len(column) for name, column in zip(names, columns, strict=bool(columns))}


class WeightedScorer:
    """The weighted sum of several scorers. The first one says what is correct, and what the answer was."""

    def __init__(self, terms: Sequence[Term], scorers: Sequence[Scorer]) -> None:
        self._terms, self._scorers = terms, scorers
        self.counts: Counter[str] = Counter()

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """One result per item, in order. Its status is the first one that is not ok."""
        with ThreadPoolExecutor(len(self._scorers)) as threads:
            by_term = list(threads.map(lambda scorer: scorer.score(items), self._scorers))
        results = []
        for verdicts in zip(*by_term, strict=True):
            total = sum(term.weight * verdict.score for term, verdict in zip(self._terms, verdicts, strict=True))
            status = next((verdict.status for verdict in verdicts if verdict.status != OK), OK)
            scores = tuple(verdict.score for verdict in verdicts)
            results.append(RewardResult(total, verdicts[0].correct, status, verdicts[0].answer, scores))
        self.counts.update(result.status for result in results)
        return results

    def close(self) -> None:
        for scorer in self._scorers:
            scorer.close()
