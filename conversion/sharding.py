"""Tensor-parallel slices of full Megatron tensors, and names in their two spellings. Pure torch.

A slice is what Megatron-Core's `VocabParallelEmbedding`, `ColumnParallelLinear` and `RowParallelLinear` hold on one
rank. Only the gated `linear_fc1` is not a plain slice: each rank holds its gate rows above its up rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

VOCAB_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")

# (pattern of the local-spec name, axis that is cut, number of blocks along that axis that are cut separately)
_LAYOUT: tuple[tuple[str, int, int], ...] = (
    (r"embedding\.word_embeddings\.weight|output_layer\.weight", 0, 1),
    (r"decoder\.layers\.\d+\.self_attention\.linear_qkv\.(weight|bias)", 0, 1),
    (r"decoder\.layers\.\d+\.self_attention\.linear_(q_proj|(q|kv)_(up|down)_proj)\.weight", 0, 1),
    (r"decoder\.layers\.\d+\.self_attention\.linear_proj\.weight", 1, 1),
    (r"decoder\.layers\.\d+\.mlp\.(experts\.local_experts\.\d+\.|shared_experts\.)?linear_fc1\.(weight|bias)", 0, 2),
    (r"decoder\.layers\.\d+\.mlp\.(experts\.local_experts\.\d+\.|shared_experts\.)?linear_fc2\.weight", 1, 1),
    (r"decoder\.layers\.\d+\.self_attention\.[qk]_layernorm\.weight_over_heads", 0, 1),
)
_REPLICATED = re.compile(
    r"decoder\.final_layernorm\.weight|decoder\.layers\.\d+\.((input|pre_mlp)_layernorm\.weight|"
    r"self_attention\.((q|k|kv)_layernorm\.weight|linear_proj\.(bias|post_layernorm\.weight))|"
    r"mlp\.(linear_fc2\.(bias|post_layernorm\.weight)|router\.(weight|expert_bias)|shared_experts\.gate_weight))"
)

# Transformer Engine fuses a norm into the linear layer that follows it and numbers grouped experts in the last field.
_TE_TO_LOCAL: tuple[tuple[str, str], ...] = (
    (r"(.*\.)self_attention\.linear_qkv\.layer_norm_(weight|bias)", r"\1input_layernorm.\2"),
    (r"(.*\.)mlp\.linear_fc1\.layer_norm_(weight|bias)", r"\1pre_mlp_layernorm.\2"),
    (r"(.*\.self_attention\.)linear_(q|kv)_up_proj\.layer_norm_weight", r"\1\2_layernorm.weight"),
    (r"(.*\.mlp\.experts\.)(linear_fc[12]\.weight)(\d+)", r"\1local_experts.\3.\2"),
)
_LATENT_TO_TE = ((r"(.*\.self_attention\.)(q|kv)_layernorm\.weight", r"\1linear_\2_up_proj.layer_norm_weight"),)
_LOCAL_TO_TE: tuple[tuple[str, str], ...] = (
    (r"(.*\.)input_layernorm\.(weight|bias)", r"\1self_attention.linear_qkv.layer_norm_\2"),
    (r"(.*\.)pre_mlp_layernorm\.(weight|bias)", r"\1mlp.linear_fc1.layer_norm_\2"),
    (r"(.*\.mlp\.experts\.)local_experts\.(\d+)\.(linear_fc[12]\.weight)", r"\1\3\2"),
)


def local_name(name: str) -> str:
    """The local layer spec's spelling of a parameter name in either spelling."""
    return _rename(name, _TE_TO_LOCAL)


def te_name(name: str, moe: bool = False, latent: bool = False) -> str:
    """The Transformer Engine layer spec's spelling.

    In a mixture of experts the norm before the MLP is not fused; with latent attention those of the latents are, and
    that before attention is not.
    """
    if (moe and "pre_mlp_layernorm" in name) or (latent and "input_layernorm" in name):
        return name
    return _rename(name, (*_LATENT_TO_TE, *_LOCAL_TO_TE) if latent else _LOCAL_TO_TE)


def _rename(name: str, table: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def padded_vocab(vocab_size: int, tp_size: int, multiple: int = 1) -> int:
    """The smallest number of rows >= `vocab_size` that is a multiple of `tp_size * multiple`."""
    unit = tp_size * multiple
    return -(-vocab_size // unit) * unit


def layout(megatron_name: str) -> tuple[int, int] | None:
    """(axis, blocks) along which a tensor is cut for tensor parallelism; None when every rank holds all of it.

    Raises ValueError for a name that no table knows.
    """
    name = local_name(megatron_name)
    for pattern, axis, blocks in _LAYOUT:
        if re.fullmatch(pattern, name):
            return axis, blocks
    if _REPLICATED.fullmatch(name) is None:
        raise ValueError(f"Megatron tensor {megatron_name!r} is not known to the conversion tables")
    return None


def shard(megatron_name: str, full: Tensor, tp_rank: int, tp_size: int, vocab_multiple: int = 1) -> Tensor:
    """The slice of a full tensor that one tensor-parallel rank holds (a contiguous copy, or `full` itself).

    Vocabulary tensors are first padded with zero rows to `padded_vocab(rows, tp_size, vocab_multiple)`.

    Raises:
        ValueError: unknown name, or a dimension that `tp_size` does not divide.
    """
    assert 0 <= tp_rank < tp_size, (tp_rank, tp_size)
    where = layout(megatron_name)
    if local_name(megatron_name) in VOCAB_TENSORS:
        rows = padded_vocab(full.shape[0], tp_size, vocab_multiple)
        if rows > full.shape[0]:
            full = torch.cat([full, full.new_zeros(rows - full.shape[0], *full.shape[1:])])
    if where is None or tp_size == 1:
        return full
    axis, blocks = where
    if full.shape[axis] % (tp_size * blocks):
        raise ValueError(
            f"{megatron_name}: dimension {axis} of size {full.shape[axis] // blocks} cannot be cut into "
            f"{tp_size} equal parts; choose a tensor-parallel size that divides it"
        )
    return torch.cat([block.chunk(tp_size, axis)[tp_rank] for block in full.chunk(blocks, axis)], axis)


def unshard(megatron_name: str, pieces: Sequence[Tensor]) -> Tensor:
    """The full tensor, from the slices of all tensor-parallel ranks in order. Vocabulary padding stays on."""
    where = layout(megatron_name)
    if where is None or len(pieces) == 1:
        return pieces[0]
    axis, blocks = where
    cut = [piece.chunk(blocks, axis) for piece in pieces]
    return torch.cat([rank[block] for block in range(blocks) for rank in cut], axis)
