"""GLM-4.7-Flash: DeepSeek-V3's attention and experts, with a list of the layers that have experts."""

from __future__ import annotations

from typing import Any

from conversion.families.deepseek import DEEPSEEK_V3, RULES
from conversion.families.llama import DEFAULTS
from conversion.families.shared import NEXT_TOKEN_LAYERS
from conversion.fields import Fields
from conversion.table import Family


def _options(config: Fields) -> dict[str, Any]:
    layers = config.integer("num_hidden_layers")
    kinds = config.strings("mlp_layer_types") or ["dense"] + ["sparse"] * (layers - 1)
    dense = kinds.count("dense")
    if kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise config.wrong("mlp_layer_types", f"'dense' for the first of {layers} layers and 'sparse' for the others")
    return DEEPSEEK_V3.options(Fields({**config.values, "first_k_dense_replace": dense}))


GLM4_MOE_LITE = Family(
    "Glm4MoeLiteForCausalLM",
    RULES,
    {
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 202752,
        "num_key_value_heads": 20,
        "kv_lora_rank": 512,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "moe_intermediate_size": 1536,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 64,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
    },
    _options,
    ignored=(NEXT_TOKEN_LAYERS,),
)
