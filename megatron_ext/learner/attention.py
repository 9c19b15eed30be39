"""Core attention for packed sequences without Transformer Engine, as a module of Megatron's local layer spec.

A packed micro-batch is one row of tokens with ``cu_seqlens`` marking where each sequence starts (Megatron's ``thd``
format). Megatron's own ``DotProductAttention`` refuses it. Here the row is spread over a right-padded batch,
``scaled_dot_product_attention`` runs with its causal flag (right padding needs no mask: a real query never sees a
later key), and the result is gathered back into the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's parameters plus the two index tensors that :class:`PackedAttention` needs, made once per micro-batch.

    ``spread_NL``: for each cell of the [sequences, max length] batch the token of the row that fills it (padding cells
    repeat token 0, whose result is never read); ``gather_T``: for each token of the row its flat cell.
    """

    spread_NL: Tensor | None = None
    gather_T: Tensor | None = None


def packed_sequences(cu_seqlens: Tensor, max_seqlen: int) -> PackedSequences:
    """``cu_seqlens``: (N + 1,) int32, non-decreasing, starting at 0. Sequences may be empty."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    column = torch.arange(max_seqlen, device=cu_seqlens.device)
    inside = column < lengths[:, None]
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        spread_NL=torch.where(inside, starts[:, None] + column, 0),
        gather_T=inside.flatten().nonzero().squeeze(1),
    )


class PackedAttention(torch.nn.Module):
    """Causal attention over packed sequences; drop-in for Megatron's ``core_attention``.

    query: (T, heads, d); key, value: (T, groups, d); returns (T, heads * d). Any float dtype. No parameters.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ValueError(
                f"parallel.cp={config.context_parallel_size} needs Transformer Engine's attention, which is not "
                "installed: set parallel.cp=1"
            )
        if config.attention_dropout:
            raise ValueError(f"attention_dropout={config.attention_dropout}: reinforcement learning needs 0")
        self.softmax_scale = softmax_scale
        self.window = config.window_size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        packed = packed_seq_params
        assert packed is not None and packed.spread_NL is not None and packed.gather_T is not None, "packed input only"
        if self.window is not None and packed.max_seqlen_q > self.window[0] + 1:
            raise ValueError(
                f"a sequence of {packed.max_seqlen_q} tokens exceeds the model's sliding window of "
                f"{self.window[0] + 1}, which needs Transformer Engine's attention: shorten data.max_prompt_tokens + "
                "rollout.max_tokens"
            )
        n, length = packed.spread_NL.shape
        index = packed.spread_NL.flatten()

        def spread(x: Tensor) -> Tensor:  # (T, h, d) -> (N, h, L, d)
            return x.index_select(0, index).view(n, length, *x.shape[1:]).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            spread(query),
            spread(key),
            spread(value),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2).reshape(n * length, -1).index_select(0, packed.gather_T)
