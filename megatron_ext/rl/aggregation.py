"""Aggregation of per-token losses to one number: a weight per sequence, with global denominators fixed in advance.

The objective of an optimizer step is sum_i w_i sum_t loss_it over its B sequences, so its gradient is the same for any
micro-batching, packing or layout. Computed once, on the host, from the lengths of *all* sequences of the step.
Sources: CE-GPPO eq. 3-4, Entropy Dynamics eq. 1, Liu et al. 2025 (Dr. GRPO) for ``constant``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.rl.params import check_choice, check_number

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "group_token_mean", "seq_mean_token_sum", "constant")


def sequence_weights(
    name: str,
    lengths_B: Tensor,
    groups_B: Tensor,
    *,
    max_tokens: int | None = None,
    include_B: Tensor | None = None,
) -> Tensor:
    """w_i of every sequence, float64 (B,). With L_i its length, B and M the numbers of included sequences and groups:

    - ``token_mean``: 1 / sum_j L_j
    - ``seq_mean_token_mean``: 1 / (B L_i). CE-GPPO eq. 3 for groups of equal size; unequal groups count by their
      sequences.
    - ``group_token_mean``: 1 / (M sum_{j in group of i} L_j), CE-GPPO eq. 4 and Entropy Dynamics eq. 1
    - ``seq_mean_token_sum``: 1 / B
    - ``constant``: 1 / (B max_tokens)

    Args:
        lengths_B: response tokens that count, int. A sequence of length 0 gets weight 0 and leaves the denominators.
            For ``selection.renormalise`` pass the number of *kept* tokens.
        groups_B: prompt of each sequence, int64; used by ``group_token_mean`` only.
        max_tokens: the response length limit, required by ``constant``.
        include_B: bool; False for samples that are filtered (overlong, stale): weight 0, and out of the denominators.
    Raises:
        ValueError: unknown name, or ``constant`` without ``max_tokens``.
    """
    check_choice("advantage.aggregation", name, AGGREGATIONS)
    lengths = lengths_B.double()
    included = lengths > 0 if include_B is None else (lengths > 0) & include_B
    lengths = torch.where(included, lengths, torch.zeros_like(lengths))
    sequences = included.sum().clamp(min=1)
    if name == "token_mean":
        weights = torch.ones_like(lengths) / lengths.sum().clamp(min=1)
    elif name == "seq_mean_token_mean":
        weights = 1 / (sequences * lengths.clamp(min=1))
    elif name == "group_token_mean":
        _, index = torch.unique(groups_B, return_inverse=True)
        tokens = torch.zeros_like(lengths).index_add_(0, index, lengths)
        weights = 1 / ((tokens > 0).sum().clamp(min=1) * tokens[index].clamp(min=1))
    elif name == "seq_mean_token_sum":
        weights = torch.ones_like(lengths) / sequences
    else:
        if max_tokens is None:
            raise ValueError("max_tokens=None: advantage.aggregation=constant needs the response length limit.")
        check_number("max_tokens", max_tokens, 1)
        weights = torch.ones_like(lengths) / (sequences * max_tokens)
    return torch.where(included, weights, torch.zeros_like(weights))
