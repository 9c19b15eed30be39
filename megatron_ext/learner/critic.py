"""The critic of PPO with GAE: a second model of the policy's family and layout with one output per token.

It starts from the policy's weights with a zero head, runs over the same packed micro-batches by the same Megatron
schedule, and has its own gradient buffers, optimizer and learning-rate schedule. The value of a response token is that
of the state before it, read at the position that gives its log-probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.schema import Config
from megatron_ext.learner.learner import Trainable
from megatron_ext.learner.step import MicroBatch, TrainBatch, forward, local_responses, whole_micro_batch
from megatron_ext.rl.value import value_loss


class Critic(Trainable):
    """A value function under training. Create inside :func:`megatron_ext.learner.model.distributed`.

    ``config.critic`` has the settings that differ from the policy; batching, optimizer, warm-up and decay are the
    policy's. During construction the last stage temporarily holds the policy's output layer too.
    """

    def __init__(self, config: Config, model_dir: Path, *, total_updates: int) -> None:
        """See :class:`Trainable`."""
        critic = config.critic
        optim = replace(
            config.optim, lr=critic.lr, min_lr=min(config.optim.min_lr, critic.lr), clip_grad=critic.clip_grad
        )
        super().__init__(replace(config, optim=optim), model_dir, total_updates=total_updates, value_head=True)

    @torch.no_grad()
    def values(self, batch: TrainBatch) -> Tensor:
        """Value of the state before every response token, (T,) in sample order, the same on every rank."""
        samples = range(len(batch.responses))
        return self._forward_pass(batch, samples, partial(values_step, device=self.device), rows=1)[0]

    def update(
        self, batch: TrainBatch, samples: Sequence[int], weights_B: Tensor, returns_T: Tensor, old_values_T: Tensor
    ) -> dict[str, float]:
        """One optimizer step towards ``returns_T`` on ``samples``; global metrics, the same on every rank.

        Args:
            weights_B: (B,) float64 weight of each sample's tokens, with the global denominator in it.
            returns_T, old_values_T: (T,) of the whole batch.
        Returns:
            ``value_loss`` (the objective), ``value_clipfrac`` (share of tokens), ``grad_norm``, ``lr``,
            ``skipped_updates``.
        """
        step = partial(
            value_training_step,
            batch=batch,
            returns_T=returns_T,
            old_values_T=old_values_T,
            clip_range=self.config.critic.clip_range,
            device=self.device,
        )
        totals, about = self._optimize(batch, samples, weights_B, step)
        clipped = totals["clipped"] / max(totals["tokens"], 1.0)
        return {"value_loss": totals["value_loss"], "value_clipfrac": clipped, **about}


def values_step(
    iterator: Iterator[MicroBatch], model: Any, *, device: torch.device
) -> tuple[Tensor, Callable[..., Any]]:
    """Megatron ``forward_step_func``; yields (flat indices, (1, R) values) per micro-batch."""
    mb = next(iterator)

    def collect(output: Tensor) -> tuple[Tensor, Tensor, Any]:
        return output.new_zeros(()), torch.zeros((), dtype=torch.int), (mb.flat_R, _values(output, mb)[None])

    return forward(model, mb, device), collect


def value_training_step(
    iterator: Iterator[MicroBatch],
    model: Any,
    *,
    batch: TrainBatch,
    returns_T: Tensor,
    old_values_T: Tensor,
    clip_range: float | None,
    device: torch.device,
) -> tuple[Tensor, Callable[..., Any]]:
    """Megatron ``forward_step_func`` of an optimizer step: sum of w * value loss over unfiltered response tokens.

    The denominator is in w, as in `step.training_step`.
    """
    mb = next(iterator)

    def objective(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        values_R, flat = _values(output, mb), mb.flat_R
        returns_R, old_R = (x[flat].to(values_R) for x in (returns_T, old_values_T))
        loss_R, clipped_R = value_loss(values_R, returns_R, old_R, clip_range=clip_range)
        mask_R = batch.mask[flat].to(device)
        assert mb.weight_R is not None
        weight_R = torch.where(mask_R, mb.weight_R.to(values_R), 0.0)
        total = (weight_R * loss_R).sum()
        sums = {
            "value_loss": total.detach().double(),
            "clipped": (clipped_R & mask_R).sum().double(),
            "tokens": mask_R.sum().double(),
        }
        return total, torch.tensor(int(mb.counts_divisor), dtype=torch.int, device=device), sums

    return forward(model, mb, device), objective


def _values(output: Tensor, mb: MicroBatch) -> Tensor:
    """(R,) of the whole micro-batch, from the model's (1, local tokens, 1)."""
    places = local_responses(mb)
    return whole_micro_batch(output[0].index_select(0, places.to(output.device)), places, mb)[:, 0]
