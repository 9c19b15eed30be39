"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, one of which every token passes through a gate."""

from __future__ import annotations

from typing import Any

from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, MLP, in_layers
from conversion.families.qwen3_moe import EXPERTS, routed_experts
from conversion.fields import Fields
from conversion.table import Family, Rule

_HF = "model.layers.{layer}.mlp."
_MEGATRON = "decoder.layers.{layer}.mlp.shared_experts."

SHARED_EXPERT = (
    Rule(
        _MEGATRON + "linear_fc1.weight",
        "gate_up",
        {
            _HF + "shared_expert.gate_proj.weight": "shared_ffn hidden",
            _HF + "shared_expert.up_proj.weight": "shared_ffn hidden",
        },
    ),
    Rule(_MEGATRON + "linear_fc2.weight", "copy", {_HF + "shared_expert.down_proj.weight": "hidden shared_ffn"}),
    Rule(_MEGATRON + "gate_weight", "copy", {_HF + "shared_expert_gate.weight": "one hidden"}),
)


def _options(config: Fields) -> dict[str, Any]:
    # transformers 4 and 5 give windows to different layers of this family, and no released model uses them.
    config.only("use_sliding_window", False, why="no released model has it")
    shared = config.integer("shared_expert_intermediate_size")
    experts = routed_experts(config, shared_ffn_hidden_size=shared, shared_gate=True)
    return {"qkv_bias": config.flag("qkv_bias", True), "experts": experts}


QWEN2_MOE = Family(
    "Qwen2MoeForCausalLM",
    EMBEDDINGS + ATTENTION + in_layers("sparse", EXPERTS + SHARED_EXPERT) + in_layers("dense", MLP),
    {
        **DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
    },
    _options,
)
