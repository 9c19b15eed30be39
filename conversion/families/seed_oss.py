"""Seed-OSS: Llama with a bias on query, key and value, and head_dim independent of hidden_size."""

from __future__ import annotations

from typing import Any

from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, MLP
from conversion.fields import Fields
from conversion.table import Family


def _options(config: Fields) -> dict[str, Any]:
    for key in ("attention_out_bias", "mlp_bias"):
        if config.flag(key):
            raise ValueError(f"{key}=True is not supported for Seed-OSS: no released model has it")
    return {"qkv_bias": config.flag("attention_bias", True)}


SEED_OSS = Family(
    "SeedOssForCausalLM",
    EMBEDDINGS + ATTENTION + MLP,
    {**DEFAULTS, "max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128},
    _options,
)
