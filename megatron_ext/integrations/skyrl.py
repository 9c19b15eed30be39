"""SkyRL: our losses as policy losses. Written against skyrl-train 0.3.1, the last release with that package name.

Later versions (package ``skyrl``) scale the advantages by the aggregation beforehand and take two values from a policy
loss; they are not supported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ext.integrations.padded import loss_inputs
from megatron_ext.rl.losses import Loss


def register(name: str, loss: Loss) -> None:
    """Make ``loss`` available as ``trainer.algorithm.policy_loss_type=<name>``.

    Call it before the trainer starts: SkyRL copies its registry to the workers. Aggregation (``loss_reduction``) and
    truncated importance weights (``use_tis``) stay SkyRL's; its clip settings have no effect. Losses that need the
    entropy (`archer`, `entropy_shaped`) do not work: SkyRL computes it after the policy loss.

    Raises:
        ValueError: the name is taken.
    """
    from skyrl_train.utils.ppo_utils import PolicyLossRegistry, reduce_loss

    def policy_loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, float]:
        mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        out = loss(loss_inputs(log_probs, old_log_probs, advantages, mask))
        per_token = out.loss.view_as(log_probs)
        if config.use_tis:
            assert rollout_logprobs is not None, "use_tis without the engine's log-probabilities"
            difference = torch.where(mask.bool(), old_log_probs - rollout_logprobs, 0.0)
            per_token = per_token * difference.exp().clamp(max=config.tis_imp_ratio_cap)
        total = reduce_loss(per_token, loss_mask, config.loss_reduction, config.max_seq_len)
        clipped = sum(out.metrics[f"pg_clipfrac_{side}"] for side in ("low", "high", "dual"))
        return total, float(clipped)

    PolicyLossRegistry.register(name, policy_loss)
