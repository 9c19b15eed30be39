"""Phi-3 and Phi-4: Llama whose queries, keys and values are one tensor on disk, and so are gate and up projections."""

from __future__ import annotations

from typing import Any

from conversion.families.glm4 import FUSED_MLP
from conversion.families.llama import DEFAULTS, EMBEDDINGS, INPUT_NORMS, OUTPUT_PROJECTION
from conversion.fields import Fields
from conversion.table import Family, Rule

_QKV = "model.layers.{layer}.self_attn.qkv_proj.weight"

FUSED_QKV = (
    Rule(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        "qkv",
        {_QKV + "#0": "q hidden", _QKV + "#1": "kv hidden", _QKV + "#2": "kv hidden"},
    ),
)


def _options(config: Fields) -> dict[str, Any]:
    return {"window": config.optional_integer("sliding_window")}


PHI3 = Family(
    "Phi3ForCausalLM",
    EMBEDDINGS + INPUT_NORMS + FUSED_QKV + OUTPUT_PROJECTION + FUSED_MLP,
    {**DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    _options,
    rotary="partial",
)
