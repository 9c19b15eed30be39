"""Context parallelism: the tokens of a packed row that this rank holds, and the gathers of the other ranks' tokens.

All context-parallel ranks pack the same micro-batch; rank c runs the model over its zig-zag share of it
(`packing.zigzag`). Two gathers join the shares. They differ only in backward:

* `gather_keys` inside attention. Every rank uses the gathered keys for different queries, so the gradient of a key is
  the sum over the ranks.
* `gather_tokens` at the end of the model. Every rank computes the same thing from it, the loss of the whole
  micro-batch, so each rank already has the full gradient of its own tokens and takes that. Losses of whole sequences
  thus get whole sequences, and losses, metrics and denominators do not depend on context parallelism. Only a few
  numbers per token are gathered.

With both, the gradient of a rank's weights is that of the global objective through its own tokens, and Megatron sums it
over data- and context-parallel ranks.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_ext.rl import packing


def rank_and_size() -> tuple[int, int]:
    """Of this process in its context-parallel group."""
    return parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()


def local_tokens(cu_seqlens: Tensor) -> Tensor:
    """(T / cp,) int64: the tokens of the row that this rank holds, in its order."""
    return packing.zigzag(cu_seqlens, *rank_and_size())


def gathered_order(cu_seqlens: Tensor) -> Tensor:
    """(T,) int64: the index of each token of the row in the result of the gathers."""
    _, size = rank_and_size()
    held = torch.cat([packing.zigzag(cu_seqlens, rank, size) for rank in range(size)])
    return torch.empty_like(held).scatter_(0, held, torch.arange(len(held)))


def gather_keys(local: Tensor) -> Tensor:
    """(T / cp, ...) of every rank as (T, ...), rank after rank; the gradient is summed over the ranks."""
    return _gather(local, summed=True)


def gather_tokens(local: Tensor) -> Tensor:
    """(T / cp, ...) of every rank as (T, ...), rank after rank; for values that all ranks use in the same way."""
    return _gather(local, summed=False)


def _gather(local: Tensor, *, summed: bool) -> Tensor:
    """Megatron's all-gather along the first dimension, which has both kinds of backward pass, over our group."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return local
    gathered: Tensor = gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=summed, group=group)
    return gathered
