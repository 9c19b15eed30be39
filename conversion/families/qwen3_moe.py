"""Qwen3 mixture of experts: Qwen3 with a router and experts, in every layer or in some."""

from __future__ import annotations

from typing import Any

from conversion.config import Experts
from conversion.families.llama import ATTENTION, DEFAULTS, EMBEDDINGS, MLP, in_layers
from conversion.families.qwen3 import QK_NORM, qwen3_options
from conversion.fields import Fields
from conversion.table import Family, Rule

_MEGATRON = "decoder.layers.{layer}.mlp."


def expert_rules(prefix: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Router and experts of a layer, from their Hugging Face prefix and the names of an expert's projections."""
    expert = prefix + "experts.{expert}."
    return (
        Rule(_MEGATRON + "router.weight", "copy", {prefix + "gate.weight": "experts hidden"}),
        Rule(
            _MEGATRON + "experts.local_experts.{expert}.linear_fc1.weight",
            "gate_up",
            {f"{expert}{gate}.weight": "expert_ffn hidden", f"{expert}{up}.weight": "expert_ffn hidden"},
        ),
        Rule(
            _MEGATRON + "experts.local_experts.{expert}.linear_fc2.weight",
            "copy",
            {f"{expert}{down}.weight": "hidden expert_ffn"},
        ),
    )


EXPERTS = expert_rules("model.layers.{layer}.mlp.", "gate_proj", "up_proj", "down_proj")


def routed_experts(config: Fields, **more: Any) -> Experts:
    """The experts of the Qwen families; `more`: further fields of `Experts`."""
    layers, step = config.integer("num_hidden_layers"), config.integer("decoder_sparse_step", default=1)
    dense = set(config.integers("mlp_only_layers") or ())
    sparse = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    if not any(sparse):
        raise ValueError(f"decoder_sparse_step={step} and mlp_only_layers leave no layer with experts")
    experts = Experts(
        # transformers 5 writes the first, 4 the second
        count=config.optional_integer("num_local_experts") or config.integer("num_experts"),
        ffn_hidden_size=config.integer("moe_intermediate_size"),
        top_k=config.integer("num_experts_per_tok"),
        normalise_top_k=config.flag("norm_topk_prob"),
        sparse_layers=() if all(sparse) else sparse,
        **more,
    )
    if experts.top_k > experts.count:
        raise ValueError(f"num_experts_per_tok={experts.top_k} must be between 1 and num_experts={experts.count}")
    return experts


def _options(config: Fields) -> dict[str, Any]:
    return {**qwen3_options(config), "experts": routed_experts(config)}


QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    EMBEDDINGS + ATTENTION + QK_NORM + in_layers("sparse", EXPERTS) + in_layers("dense", MLP),
    {
        **DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    _options,
)
