"""NeMo-Aligner 0.7's PPO actor with one of our losses instead of its own.

Written against `MegatronGPTActorModel.get_actor_forward_output_and_loss_func` and `.get_loss_and_metrics` of
nemo_aligner/models/nlp/gpt/megatron_gpt_ppo_actor.py (Apache-2.0). The forward pass stays theirs; only the closure that
turns logits into a loss is replaced. One intended difference: NeMo-Aligner averages over the tokens of every
micro-batch and then over micro-batches, so tokens of short micro-batches get more weight. Here every token of the
global batch has the same weight, for any `micro_batch_size`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_ext.integrations.padded import loss_inputs
from megatron_ext.rl.losses import Loss

Batch = Mapping[str, Tensor | None]
_MISSING = "NeMo-Aligner is not installed: this adapter runs in its container (see docs/integrations.md)"


def actor_class(loss: Loss, base: type | None = None) -> type:
    """A subclass of NeMo-Aligner's `MegatronGPTActorModel` that trains with `loss` (from `build_loss`).

    Args:
        base: the class to extend, if not the installed one.

    Raises:
        ImportError: NeMo-Aligner is not installed.
    """
    if base is None:
        try:
            from nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor import MegatronGPTActorModel as base  # type: ignore
        except ImportError as error:
            raise ImportError(_MISSING) from error

    class Actor(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.entropy_bonus > 0:
                raise ValueError(
                    f"model.ppo.entropy_bonus={self.entropy_bonus} is not used by this actor: set it to 0 and control "
                    "entropy by the loss"
                )

        def get_loss_and_metrics(self, batch: Batch, forward_only: bool) -> Any:
            """As upstream, after counting the tokens of the global batch; a collective over data-parallel ranks."""
            from nemo_aligner.utils import parallel_state

            group = parallel_state.get_data_parallel_group()
            tokens = valid_tokens(batch).sum(dtype=torch.float32).to(_device())
            torch.distributed.all_reduce(tokens, group=group)
            micro_batches = len(batch["response_tokens"]) // self.cfg.micro_batch_size  # type: ignore[arg-type]
            # Megatron divides by the micro-batches of a rank and averages the gradients of the ranks.
            self.tokens_per_micro_batch = tokens / (micro_batches * torch.distributed.get_world_size(group))
            return super().get_loss_and_metrics(batch, forward_only)

        def get_actor_forward_output_and_loss_func(self) -> Callable[[Iterator[Batch], Any], Any]:
            forward = super().get_actor_forward_output_and_loss_func()

            def forward_with_our_loss(data_iterator: Iterator[Batch], model: Any) -> Any:
                batch = next(data_iterator)
                parallel_logits, _ = forward(iter([batch]), model)
                return parallel_logits, lambda logits: self._loss(logits, batch)

            return forward_with_our_loss

        def _loss(self, parallel_logits: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            """Scalar to back-propagate, and the metrics that upstream logs, averaged over data-parallel ranks."""
            from nemo_aligner.utils import parallel_state
            from nemo_aligner.utils.distributed import from_parallel_logits_to_logprobs

            tokens, old, advantages = (
                batch[key].to(parallel_logits.device)  # type: ignore[union-attr]
                for key in ("response_tokens", "prev_logprobs", "advantages")
            )
            mask = valid_tokens(batch).to(parallel_logits.device)
            logp = from_parallel_logits_to_logprobs(
                vocab_parallel_logits=parallel_logits, target=tokens, higher_stability=True
            )
            inputs = loss_inputs(logp, old, advantages, mask)
            scale = 1 / self.tokens_per_micro_batch.to(parallel_logits.device).clamp(min=1e-9)
            total = loss(inputs).loss.sum() * scale
            with torch.no_grad():
                ratios = (logp - old).exp() * mask
                clamped = (logp - old).exp().clamp(1 - self.ratio_eps, 1 + self.ratio_eps) * mask
                values = torch.stack([total.detach(), ratios.sum() * scale, clamped.sum() * scale, total.new_zeros(())])
                group = parallel_state.get_data_parallel_group()
                torch.distributed.all_reduce(values, group=group)
                values /= torch.distributed.get_world_size(group)
            names = ("loss", "ppo_ratio", "ppo_ratio_clamped", "scaled_entropy")
            return total, dict(zip(names, values, strict=True))

    return Actor


def valid_tokens(batch: Batch) -> Tensor:
    """(B, S-1) bool: response tokens of sequences that ended, which is where upstream trains."""
    mask, is_end = batch["mask"], batch.get("is_end")
    assert mask is not None
    return mask.bool() if is_end is None else mask.bool() & is_end.bool().view(-1, 1)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
