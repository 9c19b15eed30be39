"""OLMo-2: norms after attention and MLP instead of before, and an RMSNorm over all heads of queries and of keys."""

from __future__ import annotations

from typing import Any

from conversion.families.llama import DEFAULTS, EMBEDDINGS, LINEAR_ATTENTION, MLP, post_norm
from conversion.fields import Fields
from conversion.table import Family, Rule

_HF = "model.layers.{layer}."
_QK = "decoder.layers.{layer}.self_attention."

QK_NORM_OVER_HEADS = (
    Rule(_QK + "q_layernorm.weight_over_heads", "copy", {_HF + "self_attn.q_norm.weight": "q"}),
    Rule(_QK + "k_layernorm.weight_over_heads", "copy", {_HF + "self_attn.k_norm.weight": "kv"}),
)


def _options(config: Fields) -> dict[str, Any]:
    config.only("attention_bias", False, why="no released OLMo-2 has it")
    return {"norms": "after", "qk_norm": True, "qk_norm_over_heads": True}


OLMO2 = Family(
    "Olmo2ForCausalLM",
    EMBEDDINGS
    + LINEAR_ATTENTION
    + QK_NORM_OVER_HEADS
    + MLP
    + (post_norm("self_attention.linear_proj", "post_attention"), post_norm("mlp.linear_fc2", "post_feedforward")),
    {**DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    _options,
)
