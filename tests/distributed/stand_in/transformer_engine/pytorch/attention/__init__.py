from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.module import TransformerEngineBaseModule


class DotProductAttention(TransformerEngineBaseModule):
    """Causal attention over packed sequences, one after the other; sliding windows included."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        *,
        attention_dropout: float,
        tp_size: int,
        num_gqa_groups: int,
        softmax_scale: float | None = None,
        window_size: tuple[int, int] | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0 and tp_size == 1
        self.softmax_scale, self.window_size, self.grouped = softmax_scale, window_size, num_gqa_groups

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        qkv_format: str,
        cu_seqlens_q: Tensor,
        attn_mask_type: str,
        **_: Any,
    ) -> Tensor:
        assert qkv_format == "thd" and attn_mask_type == "padding_causal" and attention_mask is None
        bounds = cu_seqlens_q.tolist()
        out = [self._one(*(x[a:b] for x in (query, key, value))) for a, b in zip(bounds, bounds[1:], strict=False)]
        return torch.cat(out)

    def _one(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = torch.arange(len(query), device=query.device)
        behind = rows[:, None] - rows
        mask = behind >= 0
        if self.window_size is not None:
            mask &= behind <= self.window_size[0]
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.softmax_scale, enable_gqa=q.shape[0] != k.shape[0]
        )
        return out.transpose(0, 1).flatten(1)
