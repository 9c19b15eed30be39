"""Granite 3: Llama with four constants that scale the embedding, the residual branches, attention and the logits."""

from __future__ import annotations

from typing import Any

from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, MLP, llama_options
from conversion.fields import Fields
from conversion.table import Family


def _options(config: Fields) -> dict[str, Any]:
    return {
        **llama_options(config),
        "embedding_scale": config.number("embedding_multiplier", 1.0),
        "residual_scale": config.number("residual_multiplier", 1.0),
        "attention_scale": config.number("attention_multiplier", 1.0),
        "logits_divisor": config.number("logits_scaling", 1.0),
    }


GRANITE = Family(
    "GraniteForCausalLM", EMBEDDINGS + ATTENTION + MLP, {**DEFAULTS, "max_position_embeddings": 2048}, _options
)
