"""Qwen2, Qwen2.5, Qwen2.5-Math, DeepSeek-R1-Distill-Qwen: Llama with a bias on query, key and value."""

from __future__ import annotations

from typing import Any

from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, MLP
from conversion.fields import Fields, shown
from conversion.table import Family


def sliding_window(config: Fields) -> dict[str, Any]:
    """Window size and the layers that have it, from Qwen's four keys; `layer_types` wins when it is written out."""
    window = config.optional_integer("sliding_window")
    if not config.flag("use_sliding_window") or window is None:
        return {}
    layers = config.integer("num_hidden_layers")
    first = config.integer("max_window_layers", least=0, default=28)
    types = config.strings("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
    ]
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"layer_types={shown(types)} must name sliding_attention or full_attention for each of "
            f"num_hidden_layers={layers}"
        )
    windowed = tuple(kind == "sliding_attention" for kind in types)
    return {"window": window, "window_layers": windowed} if any(windowed) else {}


def _options(config: Fields) -> dict[str, Any]:
    return {"qkv_bias": True, **sliding_window(config)}


QWEN2 = Family(
    "Qwen2ForCausalLM",
    EMBEDDINGS + ATTENTION + MLP,
    {**DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    _options,
)
