"""Seed-OSS: Llama with a bias on query, key and value, and head_dim independent of hidden_size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, MLP
from conversion.table import Family


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("attention_out_bias", "mlp_bias"):
        if config.get(key, False):
            raise ValueError(f"{key}=True is not supported for Seed-OSS: no released model has it")
    return {"qkv_bias": bool(config.get("attention_bias", True))}


SEED_OSS = Family(
    "SeedOssForCausalLM",
    EMBEDDINGS + ATTENTION + MLP,
    {**DEFAULTS, "max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128},
    _options,
)
