"""MiniMax-M2: an RMSNorm over all heads, part of each head rotated, experts chosen by biased sigmoids."""

from __future__ import annotations

from typing import Any

from conversion.config import Experts
from conversion.families.llama import DEFAULTS, EMBEDDINGS, INPUT_NORMS, LINEAR_ATTENTION
from conversion.families.olmo2 import QK_NORM_OVER_HEADS
from conversion.families.qwen3_moe import expert_rules
from conversion.fields import Fields
from conversion.table import Family, Rule

_MOE = "model.layers.{layer}.block_sparse_moe."
_EXPERTS = expert_rules(_MOE, "w1", "w3", "w2")
_BIAS = Rule("decoder.layers.{layer}.mlp.router.expert_bias", "copy", {_MOE + "e_score_correction_bias": "experts"})


def _options(config: Fields) -> dict[str, Any]:
    for key, must in (("use_qk_norm", True), ("qk_norm_type", "per_layer"), ("use_routing_bias", True)):
        config.only(key, must, why=f"transformers' MiniMax-M2 has {key}={must}")
    config.only("scoring_func", "sigmoid", why="MiniMax-M2 routes by sigmoids")
    config.only("shared_intermediate_size", 0, why="MiniMax-M2 has no shared expert")
    if set(config.integers("attn_type_list") or [1]) != {1}:
        raise config.wrong("attn_type_list", "a list of 1: MiniMax-M2 has no linear attention")
    count, top_k = config.integer("num_local_experts"), config.integer("num_experts_per_tok")
    if not 1 < top_k <= count:
        raise ValueError(f"num_experts_per_tok={top_k} must be between 2 and num_local_experts={count}")
    experts = Experts(
        count, config.integer("intermediate_size"), top_k, normalise_top_k=True, sigmoid=True, score_bias=True
    )
    return {"qk_norm": True, "qk_norm_over_heads": True, "experts": experts}


MINIMAX_M2 = Family(
    "MiniMaxM2ForCausalLM",
    EMBEDDINGS
    + (INPUT_NORMS[0], *LINEAR_ATTENTION, *QK_NORM_OVER_HEADS, INPUT_NORMS[1])
    + (_EXPERTS[0], _BIAS, *_EXPERTS[1:]),
    {
        **DEFAULTS,
        "head_dim": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 196608,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "rope_theta": 5e6,
    },
    _options,
    rotary="partial",
)
