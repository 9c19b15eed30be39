"""GLM-4 (0414): norms in front of and behind attention and MLP, half of each head rotated in pairs of channels."""

from __future__ import annotations

from typing import Any

from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, post_norm
from conversion.fields import Fields
from conversion.table import Family, Rule

_HF = "model.layers.{layer}.mlp."
_MEGATRON = "decoder.layers.{layer}.mlp."

FUSED_MLP = (
    Rule(_MEGATRON + "linear_fc1.weight", "copy", {_HF + "gate_up_proj.weight": "2ffn hidden"}),
    Rule(_MEGATRON + "linear_fc2.weight", "copy", {_HF + "down_proj.weight": "hidden ffn"}),
)


def _options(config: Fields) -> dict[str, Any]:
    return {"qkv_bias": config.flag("attention_bias", True), "norms": "both"}


GLM4 = Family(
    "Glm4ForCausalLM",
    EMBEDDINGS
    + ATTENTION
    + FUSED_MLP
    + (post_norm("self_attention.linear_proj", "post_self_attn"), post_norm("mlp.linear_fc2", "post_mlp")),
    {
        **DEFAULTS,
        "rms_norm_eps": 1.5625e-07,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
    },
    _options,
    rotary="partial, in pairs",
)
