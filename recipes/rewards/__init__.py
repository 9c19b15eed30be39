"""Rewards: ``scorer_of(config.reward)`` gives a scorer, ``scorer.score(items)`` the verdicts."""

from recipes.rewards.pool import RewardPool, Scorer, make_scorer
from recipes.rewards.types import RewardItem, RewardResult
from recipes.rewards.verifiers import make_verifier

__all__ = ["RewardItem", "RewardPool", "RewardResult", "Scorer", "make_scorer", "make_verifier"]
