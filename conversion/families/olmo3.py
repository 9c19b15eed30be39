"""OLMo-3: OLMo-2 with sliding windows, and RoPE scaling only in the layers without one."""

from __future__ import annotations

from typing import Any

from conversion.config import Rope
from conversion.families.olmo2 import OLMO2
from conversion.fields import Fields
from conversion.rope import local_and_global
from conversion.table import Family

_LOCAL_THETA = 5e5


def window_layers(config: Fields, every: int) -> tuple[bool, ...]:
    """Which layers have the window: those of `layer_types`, else all but each `every`-th one."""
    layers = config.integer("num_hidden_layers")
    types = config.strings("layer_types")
    if types is None:
        return tuple((layer + 1) % every != 0 for layer in range(layers))
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise config.wrong("layer_types", f"sliding_attention or full_attention for each of {layers} layers")
    return tuple(kind == "sliding_attention" for kind in types)


def _options(config: Fields) -> dict[str, Any]:
    config.only("rope_theta", 5e5, 500000, why="transformers applies another base only to the layers without a window")
    windowed = window_layers(config, every=4)
    ropes = local_and_global(config, local_theta=_LOCAL_THETA, windowed=windowed)
    if ropes.get("local_rope") not in (None, Rope(_LOCAL_THETA)):
        raise ValueError(f"rope_theta={ropes['local_rope'].theta} of sliding_attention layers must be {_LOCAL_THETA:g}")
    window = {"window": config.integer("sliding_window"), "window_layers": windowed}
    return {**OLMO2.options(config), **window, **ropes}


OLMO3 = Family(
    "Olmo3ForCausalLM",
    OLMO2.rules,
    {**OLMO2.defaults, "sliding_window": 4096, "rope_theta": _LOCAL_THETA},
    _options,
    local_theta=_LOCAL_THETA,
)
