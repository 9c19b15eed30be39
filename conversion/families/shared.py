"""What mixtures of experts since DeepSeek-V2 share: shared experts, dense first layers, routing by sigmoids."""

from __future__ import annotations

from typing import Any

from conversion.config import Experts
from conversion.families.qwen3_moe import EXPERTS
from conversion.fields import Fields
from conversion.table import Rule

_HF = "model.layers.{layer}.mlp."
_MEGATRON = "decoder.layers.{layer}.mlp."

SHARED_AND_ROUTED = (
    EXPERTS[0],
    Rule(
        _MEGATRON + "router.expert_bias",
        "copy",
        {_HF + "gate.e_score_correction_bias": "experts"},
        when=lambda hf: hf.experts is not None and hf.experts.score_bias,
    ),
    *EXPERTS[1:],
    Rule(
        _MEGATRON + "shared_experts.linear_fc1.weight",
        "gate_up",
        {
            _HF + "shared_experts.gate_proj.weight": "shared_ffn hidden",
            _HF + "shared_experts.up_proj.weight": "shared_ffn hidden",
        },
    ),
    Rule(
        _MEGATRON + "shared_experts.linear_fc2.weight",
        "copy",
        {_HF + "shared_experts.down_proj.weight": "hidden shared_ffn"},
    ),
)
# Layers for predicting several tokens at once come after the last one; transformers leaves them out, and so do we.
NEXT_TOKEN_LAYERS = r"model\.layers\.(?P<beyond>\d+)\..*"


def routed(config: Fields, *, sigmoid: bool) -> Experts:
    """The experts of a config.json. ValueError for a way to choose them that Megatron-Core's router does not have."""
    layers, width = config.integer("num_hidden_layers"), config.integer("moe_intermediate_size")
    dense = config.integer("first_k_dense_replace", least=0, default=0)
    if dense >= layers:
        raise config.wrong("first_k_dense_replace", f"less than num_hidden_layers={layers}")
    config.only("moe_layer_freq", 1, why="every layer after the dense ones must have experts")
    count, top_k = config.integer("n_routed_experts"), config.integer("num_experts_per_tok")
    if top_k > count:
        raise ValueError(f"num_experts_per_tok={top_k} must be between 1 and n_routed_experts={count}")
    normalise = config.flag("norm_topk_prob")
    if sigmoid and (not normalise or top_k == 1):
        raise ValueError(
            f"norm_topk_prob={normalise} with num_experts_per_tok={top_k} is not supported: Megatron's router always "
            "normalises the sigmoids of several experts, and never that of one"
        )
    return Experts(
        count=count,
        ffn_hidden_size=width,
        top_k=top_k,
        normalise_top_k=normalise,
        sparse_layers=tuple(layer >= dense for layer in range(layers)) if dense else (),
        shared_ffn_hidden_size=width * config.integer("n_shared_experts"),
        sigmoid=sigmoid,
        score_bias=sigmoid,
        scaling=config.number("routed_scaling_factor", 1.0),
        **_groups(config, count, top_k, best=2 if sigmoid else 1),
    )


def _groups(config: Fields, count: int, top_k: int, best: int) -> dict[str, Any]:
    """Experts are chosen within the groups whose `best` experts together score highest."""
    groups, chosen = config.integer("n_group", default=1), config.integer("topk_group", default=1)
    if groups == 1:
        return {}
    if count % groups or chosen > groups or top_k > chosen * (count // groups):
        raise ValueError(f"n_group={groups} and topk_group={chosen} do not fit {count} experts, {top_k} per token")
    if top_k // chosen != best:
        raise ValueError(
            f"n_group={groups} with topk_group={chosen} and num_experts_per_tok={top_k} is not supported: the model "
            f"ranks groups by their best {best}, Megatron's router by their best {top_k // chosen}"
        )
    return {"groups": groups, "top_groups": chosen}
