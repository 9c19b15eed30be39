"""Llama 2 and 3.x, SmolLM2, DeepSeek-R1-Distill-Llama: the plain decoder that the other families vary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from conversion.fields import Fields
from conversion.table import Family, Rule

_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."

EMBEDDINGS = (
    Rule("embedding.word_embeddings.weight", "copy", {"model.embed_tokens.weight": "vocab hidden"}),
    Rule("output_layer.weight", "copy", {"lm_head.weight": "vocab hidden"}, when=lambda hf: not hf.tied),
    Rule("decoder.final_layernorm.weight", "copy", {"model.norm.weight": "hidden"}),
)

INPUT_NORMS = (
    Rule(_MEGATRON + "input_layernorm.weight", "copy", {_HF + "input_layernorm.weight": "hidden"}),
    Rule(_MEGATRON + "pre_mlp_layernorm.weight", "copy", {_HF + "post_attention_layernorm.weight": "hidden"}),
)

OUTPUT_PROJECTION = (
    Rule(_MEGATRON + "self_attention.linear_proj.weight", "copy", {_HF + "self_attn.o_proj.weight": "hidden q"}),
    Rule(
        _MEGATRON + "self_attention.linear_proj.bias",
        "copy",
        {_HF + "self_attn.o_proj.bias": "hidden"},
        when=lambda hf: hf.linear_bias,
    ),
)

LINEAR_ATTENTION = (
    Rule(
        _MEGATRON + "self_attention.linear_qkv.weight",
        "qkv",
        {
            _HF + "self_attn.q_proj.weight": "q hidden",
            _HF + "self_attn.k_proj.weight": "kv hidden",
            _HF + "self_attn.v_proj.weight": "kv hidden",
        },
    ),
    Rule(
        _MEGATRON + "self_attention.linear_qkv.bias",
        "qkv",
        {
            _HF + "self_attn.q_proj.bias": "q",
            _HF + "self_attn.k_proj.bias": "kv",
            _HF + "self_attn.v_proj.bias": "kv",
        },
        when=lambda hf: hf.qkv_bias or hf.linear_bias,
    ),
    *OUTPUT_PROJECTION,
)

# In the order of a forward pass.
ATTENTION = (INPUT_NORMS[0], *LINEAR_ATTENTION, INPUT_NORMS[1])

MLP = (
    Rule(
        _MEGATRON + "mlp.linear_fc1.weight",
        "gate_up",
        {_HF + "mlp.gate_proj.weight": "ffn hidden", _HF + "mlp.up_proj.weight": "ffn hidden"},
    ),
    Rule(
        _MEGATRON + "mlp.linear_fc1.bias",
        "gate_up",
        {_HF + "mlp.gate_proj.bias": "ffn", _HF + "mlp.up_proj.bias": "ffn"},
        when=lambda hf: hf.linear_bias,
    ),
    Rule(_MEGATRON + "mlp.linear_fc2.weight", "copy", {_HF + "mlp.down_proj.weight": "hidden ffn"}),
    Rule(
        _MEGATRON + "mlp.linear_fc2.bias",
        "copy",
        {_HF + "mlp.down_proj.bias": "hidden"},
        when=lambda hf: hf.linear_bias,
    ),
)


def post_norm(linear: str, hf_name: str) -> Rule:
    """The norm behind a projection that ends attention or MLP: our layers keep it inside that projection."""
    return Rule(_MEGATRON + linear + ".post_layernorm.weight", "copy", {_HF + hf_name + "_layernorm.weight": "hidden"})


def in_layers(kind: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The same rules for the "dense" or the "sparse" layers of a mixture of experts alone."""
    return tuple(replace(rule, layers=kind) for rule in rules)


DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}


def llama_options(config: Fields) -> dict[str, Any]:
    attention, mlp = config.flag("attention_bias"), config.flag("mlp_bias")
    if attention != mlp:
        raise ValueError(
            f"attention_bias={attention} with mlp_bias={mlp} is not supported: Megatron has one switch for the bias "
            "of the attention output and the MLP, so both must be on or both off"
        )
    return {"linear_bias": attention}


LLAMA = Family(
    "LlamaForCausalLM", EMBEDDINGS + ATTENTION + MLP, {**DEFAULTS, "max_position_embeddings": 2048}, llama_options
)
