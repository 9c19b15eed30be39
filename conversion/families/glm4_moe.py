"""GLM-4.5 mixture of experts: half of each head rotated, shared experts, routing by biased sigmoids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, MLP, in_layers
from conversion.families.qwen3 import QK_NORM
from conversion.families.shared import NEXT_TOKEN_LAYERS, SHARED_AND_ROUTED, routed
from conversion.fields import Fields
from conversion.table import Family

_QK_NORM = tuple(replace(rule, when=lambda hf: hf.qk_norm) for rule in QK_NORM)


def _options(config: Fields) -> dict[str, Any]:
    return {
        "qkv_bias": config.flag("attention_bias"),
        "qk_norm": config.flag("use_qk_norm"),
        "experts": routed(config, sigmoid=True),
    }


GLM4_MOE = Family(
    "Glm4MoeForCausalLM",
    EMBEDDINGS + ATTENTION + _QK_NORM + in_layers("sparse", SHARED_AND_ROUTED) + in_layers("dense", MLP),
    {
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.5,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
    },
    _options,
    rotary="partial",
    ignored=(NEXT_TOKEN_LAYERS,),
)
