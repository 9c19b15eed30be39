"""DeepSeek-V2 and V3 (and Kimi-K2, Moonlight): latent attention, shared experts, dense first layers."""

from __future__ import annotations

from typing import Any

from conversion.config import HFConfig, Latent
from conversion.families.llama import DEFAULTS, EMBEDDINGS, INPUT_NORMS, MLP, in_layers
from conversion.families.shared import NEXT_TOKEN_LAYERS, SHARED_AND_ROUTED, routed
from conversion.fields import Fields
from conversion.table import Family, Rule

_HF = "model.layers.{layer}.self_attn."
_MEGATRON = "decoder.layers.{layer}.self_attention."


def _two_steps(hf: HFConfig) -> bool:
    return hf.latent is not None and hf.latent.q_rank is not None


LATENT_ATTENTION = (
    INPUT_NORMS[0],
    Rule(
        _MEGATRON + "linear_q_proj.weight",
        "copy",
        {_HF + "q_proj.weight": "q hidden"},
        when=lambda hf: not _two_steps(hf),
    ),
    Rule(
        _MEGATRON + "linear_q_down_proj.weight", "copy", {_HF + "q_a_proj.weight": "q_latent hidden"}, when=_two_steps
    ),
    Rule(_MEGATRON + "q_layernorm.weight", "copy", {_HF + "q_a_layernorm.weight": "q_latent"}, when=_two_steps),
    Rule(_MEGATRON + "linear_q_up_proj.weight", "copy", {_HF + "q_b_proj.weight": "q q_latent"}, when=_two_steps),
    Rule(_MEGATRON + "linear_kv_down_proj.weight", "copy", {_HF + "kv_a_proj_with_mqa.weight": "kv_down hidden"}),
    Rule(_MEGATRON + "kv_layernorm.weight", "copy", {_HF + "kv_a_layernorm.weight": "kv_latent"}),
    Rule(_MEGATRON + "linear_kv_up_proj.weight", "copy", {_HF + "kv_b_proj.weight": "kv_up kv_latent"}),
    Rule(_MEGATRON + "linear_proj.weight", "copy", {_HF + "o_proj.weight": "hidden v"}),
    INPUT_NORMS[1],
)
RULES = EMBEDDINGS + LATENT_ATTENTION + in_layers("sparse", SHARED_AND_ROUTED) + in_layers("dense", MLP)


def _options(config: Fields, *, sigmoid: bool) -> dict[str, Any]:
    for key, must in (("attention_bias", False), ("mlp_bias", False), ("rope_interleave", True)):
        config.only(key, must, why=f"Megatron's latent attention has {key}={must} in this family")
    heads = config.integer("num_attention_heads")
    if config.integer("num_key_value_heads", default=heads) != heads:
        raise config.wrong("num_key_value_heads", f"num_attention_heads={heads}: latent attention makes keys for each")
    latent = Latent(
        kv_rank=config.integer("kv_lora_rank"),
        plain=config.integer("qk_nope_head_dim"),
        rotated=config.integer("qk_rope_head_dim"),
        value=config.integer("v_head_dim"),
        q_rank=config.optional_integer("q_lora_rank") if "q_lora_rank" in config.values else 1536,
    )
    return {
        "latent": latent,
        "head_dim": latent.plain + latent.rotated,
        "num_kv_heads": heads,
        "experts": routed(config, sigmoid=sigmoid),
    }


def _v2_options(config: Fields) -> dict[str, Any]:
    config.only("norm_topk_prob", False, why="transformers leaves the probabilities of this family as they are")
    config.only("scoring_func", "softmax", why="DeepSeek-V2 routes by a softmax")
    if config.text("topk_method", "greedy") == "greedy":
        config = Fields({**config.values, "n_group": 1})
    return _options(config, sigmoid=False)


def _v3_options(config: Fields) -> dict[str, Any]:
    config.only("scoring_func", "sigmoid", why="DeepSeek-V3 routes by sigmoids")
    config.only("topk_method", "noaux_tc", why="DeepSeek-V3 chooses experts by biased scores")
    return _options(config, sigmoid=True)


_SIZES = {**DEFAULTS, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_V2 = {"n_shared_experts": 2, "n_routed_experts": 64, "moe_intermediate_size": 1407, "max_position_embeddings": 2048}
_V3 = {"n_shared_experts": 1, "n_routed_experts": 256, "moe_intermediate_size": 2048, "max_position_embeddings": 4096}
_V3 |= {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3}
_ROUTING = {"routed_scaling_factor": 2.5, "norm_topk_prob": True}
DEEPSEEK_V2 = Family("DeepseekV2ForCausalLM", RULES, {**_SIZES, **_V2}, _v2_options)
DEEPSEEK_V3 = Family(
    "DeepseekV3ForCausalLM", RULES, {**_SIZES, **_V3, **_ROUTING}, _v3_options, ignored=(NEXT_TOKEN_LAYERS,)
)
