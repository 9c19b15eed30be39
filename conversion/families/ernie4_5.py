"""ERNIE-4.5 (dense): Llama whose heads are rotated in pairs of channels."""

from __future__ import annotations

from typing import Any

from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, MLP
from conversion.fields import Fields
from conversion.table import Family


def _options(config: Fields) -> dict[str, Any]:
    return {"linear_bias": config.flag("use_bias")}


ERNIE4_5 = Family(
    "Ernie4_5ForCausalLM",
    EMBEDDINGS + ATTENTION + MLP,
    {
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rope_theta": 5e5,
    },
    _options,
    rotary="whole, in pairs",
)
