"""Core attention for packed sequences without Transformer Engine, as a module of Megatron's local layer spec.

A packed micro-batch is one row of tokens, in which ``cu_seqlens`` marks the start of each sequence (Megatron's ``thd``
format). Megatron's own ``DotProductAttention`` does not support it. Here sequences of similar length are grouped into
padded batches, ``scaled_dot_product_attention`` runs on each, and the results are gathered back into the row.

On one rank the causal flag is the mask (right padding needs none, because a real query never attends to a later key).
Under context parallelism a rank has the queries of its share of the row and gathers all keys. There, and in layers with
a sliding window that is shorter than the sequences, the mask compares positions. It is built for one block of queries
at a time, in forward and again in backward, so nothing quadratic in the length of a sequence is kept.

Shapes: N sequences of a batch, Q and K their most queries and keys, T tokens of the row, h heads, g groups, d channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ext.learner import context_parallel

MASK_ELEMENTS = 2**24  # of one block of queries
SHORT = 64  # tokens; shorter sequences are not worth a batch of their own


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Sequences of similar length, right-padded to one size. Padding repeats token 0; its result is not used."""

    query_NQ: Tensor  # int64, tokens among this rank's
    key_NK: Tensor  # int64, tokens among all, in the order in which they are gathered
    position_NQ: Tensor | None  # int64, of each query within its sequence; None: query i is at position i


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's parameters; the further needs of :class:`PackedAttention` are computed once, on first use."""

    _batches: tuple[list[AttentionBatch], Tensor] | None = field(default=None, repr=False)

    def batches(self) -> tuple[list[AttentionBatch], Tensor]:
        """The batches, and for each of this rank's tokens its place among all their queries, batch after batch."""
        if self._batches is None:
            self._batches = _batches(self.cu_seqlens_q)
        return self._batches


def packed_sequences(cu_seqlens: Tensor, max_seqlen: int) -> PackedSequences:
    """``cu_seqlens``: (N + 1,) int32 of the whole row, non-decreasing, from 0. Sequences may be empty.

    Under context parallelism every length is a multiple of twice its size. Padding is at the end of a sequence, not
    between two; Transformer Engine needs both kinds of length anyway.
    """
    padded = cu_seqlens if context_parallel.rank_and_size()[1] > 1 else None
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )


def _batches(cu_seqlens: Tensor) -> tuple[list[AttentionBatch], Tensor]:
    """See `PackedSequences.batches`. Lengths within a batch differ by a factor of 2 at most (short ones by more)."""
    device, cu_seqlens = cu_seqlens.device, cu_seqlens.cpu()
    _, size = context_parallel.rank_and_size()
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    held, order = context_parallel.local_tokens(cu_seqlens), context_parallel.gathered_order(cu_seqlens)
    kinds: dict[int, list[int]] = {}
    for number, length in enumerate(lengths.tolist()):
        if length:
            kinds.setdefault(max(length, SHORT).bit_length(), []).append(number)
    batches: list[AttentionBatch] = []
    place, before = torch.empty_like(held), 0
    for members in kinds.values():
        start_N, length_N = starts[members], lengths[members]
        query_NQ, real_NQ = _spread(start_N // size, length_N // size)
        place[query_NQ[real_NQ]] = before + real_NQ.flatten().nonzero()[:, 0]
        before += query_NQ.numel()
        key_NK = order[_spread(start_N, length_N)[0]]
        position_NQ = (held[query_NQ] - start_N[:, None]) * real_NQ if size > 1 else None
        batches.append(
            AttentionBatch(
                query_NQ.to(device), key_NK.to(device), None if position_NQ is None else position_NQ.to(device)
            )
        )
    return batches, place.to(device)


def _spread(start_N: Tensor, length_N: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (N, longest) of the tokens of each sequence, 0 on padding; and where they are real."""
    column = torch.arange(int(length_N.max()))
    real = column < length_N[:, None]
    return torch.where(real, start_N[:, None] + column, 0), real


class PackedAttention(torch.nn.Module):
    """Causal attention over packed sequences; drop-in for Megatron's ``core_attention``.

    query: (T, h, d); key: (T, g, d); value: (T, g, v); returns (T, h * v), where T counts this rank's tokens. Any float
    dtype. No parameters.
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
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ValueError(f"attention_dropout={config.attention_dropout}: reinforcement learning needs 0")
        self.softmax_scale = softmax_scale
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None  # tokens that a query sees, itself included

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
        assert packed is not None, "packed input only"
        batches, place_T = packed.batches()
        key, value = context_parallel.gather_keys(torch.cat([key, value], -1)).split(key.shape[-1], -1)
        outputs = []
        for batch in batches:
            q, k, v = (
                x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]).transpose(1, 2)
                for x, index in ((query, batch.query_NQ), (key, batch.key_NK), (value, batch.key_NK))
            )
            attended = self._attend(q, k, v, batch.position_NQ)  # (N, h, Q, d)
            outputs.append(attended.transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(outputs).index_select(0, place_T)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, position_NQ: Tensor | None) -> Tensor:
        """(N, h, Q, v) of queries (N, h, Q, d), keys (N, g, K, d) and values (N, g, K, v)."""
        gqa = q.shape[1] != k.shape[1]
        window = self.window if self.window is not None and self.window < k.shape[2] else None
        if position_NQ is None and window is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=gqa)
        if position_NQ is None:
            position_NQ = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)

        def block(q: Tensor, k: Tensor, v: Tensor, position_NB: Tensor) -> Tensor:
            first = 0 if window is None else max(int(position_NB.min()) + 1 - window, 0)
            seen = slice(first, int(position_NB.max()) + 1)
            behind = position_NB[:, None, :, None] - torch.arange(first, seen.stop, device=q.device)  # (N, 1, B, keys)
            mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            return F.scaled_dot_product_attention(
                q, k[:, :, seen], v[:, :, seen], attn_mask=mask, scale=self.softmax_scale, enable_gqa=gqa
            )

        queries, step = q.shape[2], max(1, MASK_ELEMENTS // (q.shape[0] * k.shape[2]))
        if queries <= step:
            return block(q, k, v, position_NQ)
        blocks = [
            checkpoint(block, q[:, :, rows], k, v, position_NQ[:, rows], use_reentrant=False, preserve_rng_state=False)
            for rows in (slice(start, start + step) for start in range(0, queries, step))
        ]
        return torch.cat(blocks, dim=2)
