"""SmolLM3: Llama whose every fourth layer has no rotary embedding."""

from __future__ import annotations

from typing import Any

from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, MLP, llama_options
from conversion.fields import Fields
from conversion.table import Family


def _options(config: Fields) -> dict[str, Any]:
    config.only("use_sliding_window", False, why="no released SmolLM3 has it")
    layers, every = config.integer("num_hidden_layers"), config.integer("no_rope_layer_interval")
    rotated = config.integers("no_rope_layers")  # 1 means: this layer has rotary embeddings
    if rotated is None:
        rotated = [int((layer + 1) % every != 0) for layer in range(layers)]
    if len(rotated) != layers or not set(rotated) <= {0, 1}:
        raise config.wrong("no_rope_layers", f"a list of 0 or 1 for each of {layers} layers")
    return {**llama_options(config), "no_rope_layers": () if all(rotated) else tuple(not has for has in rotated)}


SMOLLM3 = Family(
    "SmolLM3ForCausalLM",
    EMBEDDINGS + ATTENTION + MLP,
    {
        **DEFAULTS,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "rope_theta": 2e6,
    },
    _options,
)
