"""Advantages of a batch from its rewards: per group, or per token from a critic's values.

Entropy Dynamics (app. E.4) prints only the recursion of GAE. Our choices: the reward is on the last token of a
response; advantages are whitened over the response tokens of the rollout batch; the critic's objective is the mean over
the response tokens of a mini-batch, independent of the policy's aggregation and selection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import Config
from megatron_ext.learner.critic import Critic
from megatron_ext.learner.step import TrainBatch
from megatron_ext.rl.advantages import compute_advantages, gae, soft_overlong_penalty
from megatron_ext.rl.aggregation import sequence_weights
from megatron_ext.rl.selection import Selection
from megatron_ext.rl.types import Sample
from megatron_ext.rl.value import explained_variance, last_token_rewards, whiten
from recipes.loop.metrics import StepMetrics


@dataclass(frozen=True, slots=True)
class Targets:
    """Targets of the critic for a rollout batch, (T,) each: returns, and its values before the first update."""

    returns_T: Tensor
    values_T: Tensor


def assign_advantages(
    config: Config,
    selection: Selection,
    samples: list[Sample],
    logp_T: Tensor,
    batch: TrainBatch,
    critic: Critic | None,
    metrics: StepMetrics,
) -> Targets | None:
    """Shape the rewards and compute advantages: per response, or per token with a critic, whose targets are returned.

    ``logp_T``: of the response tokens before the first update. Advantages are written per token into the batch, and
    into the samples (with a critic, the mean over their tokens).
    """
    groups_B = torch.tensor([s.group for s in samples])
    rewards_B = torch.tensor([s.reward for s in samples], dtype=torch.float64)
    lengths_B = torch.tensor([len(s.rollout.response_ids) for s in samples])
    if config.advantage.overlong == "penalty":
        rewards_B = rewards_B + soft_overlong_penalty(
            lengths_B,
            max_tokens=config.rollout.max_tokens,
            buffer=config.advantage.overlong_buffer,
            factor=config.advantage.overlong_factor,
        )
    seq_logp_B = torch.zeros(len(samples), dtype=torch.float64).index_add_(0, batch.seq_ids, logp_T.double())
    rewards_B = selection.shape_rewards(rewards_B, groups_B, seq_logp_B)
    targets: Targets | None = None
    if critic is None:
        advantages_B = compute_advantages(config.advantage.name, rewards_B, groups_B, **config.advantage.params)
        batch.advantages = advantages_B[batch.seq_ids].to(logp_T.dtype)
    else:
        targets = _gae(config, critic, rewards_B, batch, metrics)
        sums_B = torch.zeros(len(samples), dtype=torch.float64).index_add_(0, batch.seq_ids, batch.advantages.double())
        advantages_B = sums_B / lengths_B
    for sample, advantage in zip(samples, advantages_B.tolist(), strict=True):
        sample.advantage = advantage
    return targets


def _gae(config: Config, critic: Critic, rewards_B: Tensor, batch: TrainBatch, metrics: StepMetrics) -> Targets:
    """Write advantages per token into the batch; returns the critic's targets."""
    with metrics.clock("values"):
        values_T = critic.values(batch)
    rewards_T = last_token_rewards(rewards_B, batch.offsets)
    advantages_T, returns_T = gae(rewards_T, values_T, batch.seq_ids, **config.advantage.params)
    batch.advantages = whiten(advantages_T, batch.mask).to(critic.dtype)
    if bool(batch.mask.any()):
        metrics.add(
            {
                "critic/values_mean": float(values_T[batch.mask].double().mean()),
                "critic/explained_variance": explained_variance(values_T[batch.mask], returns_T[batch.mask]),
            }
        )
    return Targets(returns_T, values_T)


def update_critic(critic: Critic, targets: Targets, batch: TrainBatch, mini: Sequence[int]) -> dict[str, float]:
    """One optimizer step of the critic on a mini-batch; its metrics."""
    index = torch.tensor(list(mini))
    lengths_B = torch.zeros(len(batch.responses), dtype=torch.long).index_add_(0, batch.seq_ids, batch.mask.long())
    weights_B = torch.zeros(len(lengths_B), dtype=torch.float64)
    weights_B[index] = sequence_weights(
        "token_mean",
        lengths_B[index],
        index,  # this mean does not depend on prompt groups
        max_tokens=int(lengths_B.max()),
    )
    return critic.update(batch, mini, weights_B, targets.returns_T, targets.values_T)
