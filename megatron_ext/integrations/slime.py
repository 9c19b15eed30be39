"""slime and its fork vime: our losses as ``--loss-type custom_loss``. Written against their sources of August 2026.

A custom loss gets the logits of a micro-batch; log-probabilities and entropies are taken by the trainer's own function,
and the loss is averaged by its own reducer, so that tensor parallelism, packing and denominators stay the trainer's.
"""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_ext.rl.losses import Loss
from megatron_ext.rl.types import LossInputs

CustomLoss = Callable[
    [Namespace, Mapping[str, Any], Tensor, Callable[[Tensor], Tensor]], tuple[Tensor, dict[str, Tensor]]
]

UNUSED = ("use_kl_loss", "use_tis", "use_opsm", "get_mismatch_metrics")
"""Options of the trainers' own policy loss that have no effect on a custom one."""


def loss_function(loss: Loss, package: str = "slime") -> CustomLoss:
    """A function for ``--custom-loss-function-path``; its entropy bonus is the trainer's ``--entropy-coef``.

    Args:
        package: ``slime`` or ``vime``.
    The function raises ValueError for the options in `UNUSED`, and for context parallelism, under which a rank sees
    only parts of a response.
    """

    def custom_loss(
        args: Namespace, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        for name in UNUSED:
            if getattr(args, name, False):
                raise ValueError(f"--{name.replace('_', '-')} has no effect on this loss: leave it out.")
        if getattr(args, "context_parallel_size", 1) > 1:
            raise ValueError(f"--context-parallel-size {args.context_parallel_size}: this loss needs whole responses.")
        upstream = importlib.import_module(f"{package}.backends.megatron_utils.loss")
        _, found = upstream.get_log_probs_and_entropy(
            logits,
            args=args,
            unconcat_tokens=batch["unconcat_tokens"],
            total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"],
            with_entropy=True,
            **upstream.get_rollout_top_p_logprob_kwargs(args, batch),
        )
        logp = found["log_probs"]
        old = batch.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
        x = LossInputs(
            logp=torch.cat(logp),
            old_logp=torch.cat(old if old else [part.detach() for part in logp]),
            advantages=torch.cat(batch["advantages"]),
            mask=torch.cat(batch["loss_masks"]).bool(),
            seq_ids=torch.repeat_interleave(torch.tensor([len(part) for part in logp])).to(logits.device),
            entropy=torch.cat(found["entropy"]),
        )
        out = loss(x)
        assert x.entropy is not None
        policy, entropy = sum_of_sample_mean(out.loss), sum_of_sample_mean(x.entropy)
        total = policy - args.entropy_coef * entropy
        if not x.logp.numel():
            total = total + 0 * logits.sum()  # so that every rank takes part in the backward pass
        clipped = (out.below & (x.advantages < 0)) | (out.above & (x.advantages > 0))
        return total, {
            "loss": total.detach(),
            "pg_loss": policy.detach(),
            "entropy_loss": entropy.detach(),
            "pg_clipfrac": sum_of_sample_mean(clipped.to(out.loss.dtype)).detach(),
            "ppo_kl": sum_of_sample_mean((x.old_logp - x.logp).detach()),
        }

    return custom_loss
