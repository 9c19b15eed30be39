"""InternLM3: Llama under its own names for the bias switches, with dynamic RoPE scaling beyond the trained length."""

from __future__ import annotations

from typing import Any

from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, MLP
from conversion.fields import Fields
from conversion.table import Family


def _options(config: Fields) -> dict[str, Any]:
    return {"qkv_bias": config.flag("qkv_bias"), "linear_bias": config.flag("bias")}


INTERNLM3 = Family(
    "InternLM3ForCausalLM", EMBEDDINGS + ATTENTION + MLP, {**DEFAULTS, "max_position_embeddings": 32768}, _options
)
