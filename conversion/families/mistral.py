"""Mistral: Llama, with a sliding window on every layer when `sliding_window` is set."""

from __future__ import annotations

from typing import Any

from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, MLP
from conversion.fields import Fields
from conversion.table import Family


def _options(config: Fields) -> dict[str, Any]:
    return {"window": config.optional_integer("sliding_window")}


MISTRAL = Family(
    "MistralForCausalLM",
    EMBEDDINGS + ATTENTION + MLP,
    {**DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    _options,
)
