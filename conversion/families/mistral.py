"""Mistral: Llama, with a sliding window on every layer when `sliding_window` is set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, MLP
from conversion.table import Family


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"window": config.get("sliding_window")}


MISTRAL = Family(
    "MistralForCausalLM",
    EMBEDDINGS + ATTENTION + MLP,
    {**DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    _options,
)
