"""Mixtral: Mistral with experts in every layer, under names of its own."""

from __future__ import annotations

from typing import Any

from conversion.config import Experts
from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS
from conversion.families.qwen3_moe import expert_rules
from conversion.fields import Fields
from conversion.table import Family

EXPERTS = expert_rules("model.layers.{layer}.block_sparse_moe.", "w1", "w3", "w2")


def _options(config: Fields) -> dict[str, Any]:
    count, top_k = config.integer("num_local_experts"), config.integer("num_experts_per_tok")
    if top_k > count:
        raise ValueError(f"num_experts_per_tok={top_k} must be between 1 and num_local_experts={count}")
    experts = Experts(count, config.integer("intermediate_size"), top_k, normalise_top_k=True)
    return {"window": config.optional_integer("sliding_window"), "experts": experts}


MIXTRAL = Family(
    "MixtralForCausalLM",
    EMBEDDINGS + ATTENTION + EXPERTS,
    {
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1e6,
    },
    _options,
)
