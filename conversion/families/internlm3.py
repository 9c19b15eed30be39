"""InternLM3: Llama under its own names for the bias switches, with dynamic RoPE scaling beyond the trained length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, MLP
from conversion.table import Family


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": bool(config.get("qkv_bias", False)), "linear_bias": bool(config.get("bias", False))}


INTERNLM3 = Family(
    "InternLM3ForCausalLM", EMBEDDINGS + ATTENTION + MLP, {**DEFAULTS, "max_position_embeddings": 32768}, _options
)
