"""verl: our losses as policy losses, and token selection over the whole batch. Written against verl 0.9.1.

verl calls its policy loss with a padded micro-batch and aggregates with global denominators itself (`agg_loss`). Its
own Clip-Cov and KL-Cov select tokens in every micro-batch, so the result changes with the micro-batch size (verl issue
7829). Here `select` selects once, on the driver, over the whole batch, and stores the result in ``rollout_is_weights``,
the only per-token tensor that reaches a policy loss: 0 drops a token (it stays in the denominator), and a negative
weight marks a token under the KL-Cov penalty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ext.integrations.padded import loss_inputs, metric_values, per_token
from megatron_ext.integrations.padded import select as select_tokens
from megatron_ext.rl.losses import Loss
from megatron_ext.rl.selection import Selection

WEIGHTS = "rollout_is_weights"


def register(name: str, loss: Loss, *, kl_cov_coef: float = 0.0) -> None:
    """Make ``loss`` available as ``actor_rollout_ref.actor.policy_loss.loss_mode=<name>``.

    Call it in a module that the workers import (``actor_rollout_ref.model.external_lib``). verl's own clip settings
    have no effect on it; its entropy bonus and KL terms are added by verl as to any loss.

    Args:
        kl_cov_coef: coefficient of |log r| on the tokens that a ``kl_cov`` selection picked.
    """
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        out = loss(loss_inputs(log_prob, old_log_prob, advantages, response_mask))
        per_token_BL = out.loss.view_as(log_prob)
        if rollout_is_weights is not None:
            weights = rollout_is_weights.to(per_token_BL)
            penalised = (weights < 0) & response_mask.bool()
            distance = torch.where(penalised, log_prob - old_log_prob, 0.0).abs()
            per_token_BL = (per_token_BL + kl_cov_coef * distance) * weights.abs()
        info = {} if config is None else config.global_batch_info
        total = agg_loss(loss_mat=per_token_BL, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **info)
        return total, metric_values(out.metrics)

    register_policy_loss(name)(policy_loss)


def select(
    batch: Any, selection: Selection, *, entropies: Tensor | None = None, seed: int = 0, step: int = 0
) -> dict[str, float]:
    """Select tokens of a whole `DataProto` with ``old_log_probs`` and ``advantages``, before its first update.

    Multiplies ``rollout_is_weights`` in ``batch.batch`` by the result.

    Args:
        entropies: (B, L) ``entropys`` of verl's `compute_log_prob`, for selections by entropy.
    Returns:
        metrics under the names that our own trainer logs.
    Raises:
        ValueError: the selection needs statistics that verl does not compute, or sets an entropy bonus (use
            ``actor.entropy_coeff``), or decides in every forward pass.
    """
    if selection.per_forward():
        raise ValueError(f"{type(selection).__name__} decides in every forward pass, where verl calls nothing of ours.")
    tensors = batch.batch
    old, mask = tensors["old_log_probs"], tensors["response_mask"].bool()
    out = select_tokens(
        selection,
        logp_BL=old,
        entropy_BL=entropies,
        advantages=per_token(tensors["advantages"], old),
        mask_BL=mask,
        seed=seed,
        step=step,
    )
    if bool(out.entropy_coef.any()):
        raise ValueError("selection.name=entropy_bonus: set actor_rollout_ref.actor.entropy_coeff instead.")
    weights = tensors[WEIGHTS] if WEIGHTS in tensors.keys() else torch.ones_like(old)
    sign = torch.where(out.kl_coef.view_as(old) > 0, -1.0, 1.0)
    if out.weight is not None:
        weights = weights * out.weight.view_as(old).to(weights)
    tensors[WEIGHTS] = weights * out.keep.view_as(old) * sign.to(weights)
    return metric_values(out.metrics, prefix="")


def trainer_class(selection: Selection, base: type | None = None, *, seed: int = 0) -> type:
    """A subclass of verl's `RayPPOTrainer` that selects tokens over the whole batch before it updates the actor.

    It cannot be used with ``rollout_correction.bypass_mode``, which computes no log-probabilities of the training
    engine.
    """
    if base is None:
        from verl.trainer.ppo.ray_trainer import RayPPOTrainer as base  # type: ignore[no-redef]

    class Trainer(base):  # type: ignore[misc, valid-type]
        def _compute_old_log_prob(self, batch: Any) -> Any:
            result, mfu = super()._compute_old_log_prob(batch)
            self._selection_entropies = result.batch["entropys"]  # the caller drops them
            return result, mfu

        def _update_actor(self, batch: Any) -> Any:
            step = int(self.global_steps)
            metrics = select(batch, selection, entropies=self._selection_entropies, seed=seed, step=step)
            output = super()._update_actor(batch)
            output.meta_info["metrics"] |= {name: [value] for name, value in metrics.items()}
            return output

    return Trainer
