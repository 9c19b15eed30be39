from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    *,
    tensor_format: str,
    fused: bool,
    cu_seqlens: Tensor,
    cp_size: int,
    cp_rank: int,
    interleaved: bool = False,
) -> Tensor:
    """``t``: (tokens, heads, d); ``freqs``: (longest sequence, 1, 1, d); positions start at 0 in every sequence."""
    assert tensor_format == "thd" and fused and cp_size == 1 and not interleaved
    lengths = cu_seqlens.diff().tolist()
    angles = torch.cat([freqs[:length, 0] for length in lengths])
    first, second = t.chunk(2, -1)
    rotated = torch.cat([-second, first], -1)
    return t * angles.cos().to(t.dtype) + rotated * angles.sin().to(t.dtype)
