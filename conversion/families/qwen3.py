"""Qwen3 dense: Llama with a per-head RMSNorm on queries and keys, and head_dim independent of hidden_size."""

from __future__ import annotations

from typing import Any

from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, MLP
from conversion.families.qwen2 import sliding_window
from conversion.fields import Fields
from conversion.table import Family, Rule

QK_NORM = (
    Rule(
        "decoder.layers.{layer}.self_attention.q_layernorm.weight",
        "copy",
        {"model.layers.{layer}.self_attn.q_norm.weight": "head"},
    ),
    Rule(
        "decoder.layers.{layer}.self_attention.k_layernorm.weight",
        "copy",
        {"model.layers.{layer}.self_attn.k_norm.weight": "head"},
    ),
)


def qwen3_options(config: Fields) -> dict[str, Any]:
    """QK-norm, and no attention bias: Megatron cannot have one on the output projection without an MLP bias."""
    if config.flag("attention_bias"):
        raise ValueError("attention_bias=True is not supported for Qwen3: Megatron ties the output bias to an MLP bias")
    return {"qk_norm": True, **sliding_window(config)}


QWEN3 = Family(
    "Qwen3ForCausalLM",
    EMBEDDINGS + ATTENTION + QK_NORM + MLP,
    {**DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    qwen3_options,
)
