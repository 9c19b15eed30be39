"""Gemma-3 (text): norms by 1 + w on both sides, GELU, a scaled embedding, windows with a rotary base of their own."""

from __future__ import annotations

import math
from typing import Any

from conversion.families.llama import EMBEDDINGS, INPUT_NORMS, LINEAR_ATTENTION, MLP, post_norm
from conversion.families.olmo3 import window_layers
from conversion.families.qwen3 import QK_NORM
from conversion.fields import Fields
from conversion.rope import local_and_global
from conversion.table import Family, Rule

_LOCAL_THETA = 1e4
_NORM_BEFORE_MLP = Rule(
    "decoder.layers.{layer}.pre_mlp_layernorm.weight",
    "copy",
    {"model.layers.{layer}.pre_feedforward_layernorm.weight": "hidden"},
)


def _options(config: Fields) -> dict[str, Any]:
    config.only("hidden_activation", "gelu_pytorch_tanh", why="no released Gemma-3 has another one")
    config.only("attention_bias", False, why="no released Gemma-3 has it")
    config.only("use_bidirectional_attention", False, why="a causal language model is trained here")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key) is not None:
            raise config.wrong(key, "null: Megatron has no cap on scores or logits")
    windowed = window_layers(config, every=config.integer("sliding_window_pattern", default=6))
    return {
        "qk_norm": True,
        "norms": "both",
        "norm_plus_one": True,
        "activation": "gelu_tanh",
        "embedding_scale": math.sqrt(config.integer("hidden_size")),
        "attention_scale": config.number("query_pre_attn_scalar") ** -0.5,
        "window": config.integer("sliding_window"),
        "window_layers": windowed,
        **local_and_global(config, local_theta=config.number("rope_local_base_freq", _LOCAL_THETA), windowed=windowed),
    }


GEMMA3 = Family(
    "Gemma3ForCausalLM",
    EMBEDDINGS
    + (INPUT_NORMS[0], *LINEAR_ATTENTION, *QK_NORM)
    + (post_norm("self_attention.linear_proj", "post_attention"), _NORM_BEFORE_MLP, *MLP)
    + (post_norm("mlp.linear_fc2", "post_feedforward"),),
    {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_theta": 1e6,
    },
    _options,
    local_theta=_LOCAL_THETA,
)
