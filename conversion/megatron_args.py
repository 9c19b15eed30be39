"""Arguments of Megatron-Core's TransformerConfig and GPTModel for a model configuration."""

from __future__ import annotations

import math
import shlex
from typing import Any

import torch
from torch import Tensor

from conversion.config import HFConfig, Llama3Rope
from conversion.sharding import padded_vocab


def transformer_config(hf: HFConfig) -> dict[str, Any]:
    """Keyword arguments for `megatron.core.transformer.TransformerConfig` that follow from the architecture.

    `activation_func` is given by name (`HFConfig.activation`): this module does not import what it does not need.
    Dropout is 0, as reinforcement learning requires (old and new log-probabilities must come from the same function).
    """
    kwargs: dict[str, Any] = {
        "num_layers": hf.num_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.ffn_hidden_size,
        "num_attention_heads": hf.num_heads,
        "num_query_groups": hf.num_kv_heads,
        "kv_channels": hf.head_dim,
        "layernorm_epsilon": hf.norm_eps,
        "normalization": "RMSNorm",
        "add_qkv_bias": hf.qkv_bias,
        "add_bias_linear": hf.linear_bias,
        "qk_layernorm": hf.qk_norm and not hf.qk_norm_over_heads,
        "gated_linear_unit": True,
        "activation_func": hf.activation,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if hf.window is not None and hf.window < hf.max_positions:
        # Megatron counts the tokens to the left of the current one; Hugging Face counts the current one too.
        kwargs["window_size"] = (hf.window - 1, 0)
        if hf.window_layers and not all(hf.window_layers):
            kwargs["window_attn_skip_freq"] = [int(windowed) for windowed in hf.window_layers]
    if hf.no_rope_layers:
        kwargs["no_rope_freq"] = [int(without) for without in hf.no_rope_layers]
    if hf.norm_plus_one:
        kwargs["layernorm_zero_centered_gamma"] = True
    if hf.rope.interleaved:
        kwargs["rotary_interleaved"] = True
    if hf.attention_scale is not None:
        kwargs["softmax_scale"] = hf.attention_scale
    if hf.experts is not None:
        kwargs |= {
            "num_moe_experts": hf.experts.count,
            "moe_ffn_hidden_size": hf.experts.ffn_hidden_size,
            "moe_router_topk": hf.experts.top_k,
            # softmax over the chosen logits equals softmax over all of them, rescaled to sum to 1 on the chosen
            "moe_router_pre_softmax": not hf.experts.normalise_top_k,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_dtype": "fp32",
        }
        if hf.mixed:
            kwargs["moe_layer_freq"] = [int(sparse) for sparse in hf.experts.sparse_layers]
        if hf.experts.sigmoid:
            kwargs |= {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False}
        if hf.experts.score_bias:  # a constant here: reinforcement learning must not move it between two passes
            kwargs |= {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.0}
        if hf.experts.groups > 1:
            kwargs |= {"moe_router_num_groups": hf.experts.groups, "moe_router_group_topk": hf.experts.top_groups}
        if hf.experts.scaling != 1:
            kwargs["moe_router_topk_scaling_factor"] = hf.experts.scaling
        if hf.experts.shared_ffn_hidden_size:
            kwargs["moe_shared_expert_intermediate_size"] = hf.experts.shared_ffn_hidden_size
            kwargs["moe_shared_expert_gate"] = hf.experts.shared_gate
    return kwargs | latent_arguments(hf)


def latent_arguments(hf: HFConfig) -> dict[str, Any]:
    """Further arguments for `MLATransformerConfig`, Megatron's configuration of latent attention; empty without it."""
    if hf.latent is None:
        return {}
    kwargs: dict[str, Any] = {
        "multi_latent_attention": True,
        "q_lora_rank": hf.latent.q_rank,
        "kv_lora_rank": hf.latent.kv_rank,
        "qk_head_dim": hf.latent.plain,
        "qk_pos_emb_head_dim": hf.latent.rotated,
        "v_head_dim": hf.latent.value,
        "qk_layernorm": True,
        "rope_type": "rope",
        "rotary_base": hf.rope.theta,
        "rotary_scaling_factor": 1.0,
    }
    if (yarn := hf.rope.yarn) is not None:
        kwargs |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": hf.rope.factor,
            "original_max_position_embeddings": yarn.original_positions,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale or 1.0,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    return kwargs


def gpt_model_kwargs(hf: HFConfig, tp_size: int = 1, vocab_multiple: int = 1) -> dict[str, Any]:
    """Keyword arguments for `megatron.core.models.gpt.GPTModel` that follow from the architecture.

    `vocab_size` is padded to a multiple of `tp_size * vocab_multiple` (see `sharding.padded_vocab`): logits of the
    columns from `hf.vocab_size` on belong to no token and must be left out of every softmax. With dynamic RoPE
    scaling, `max_sequence_length` is the length up to which the scaling changes nothing, which is the only range in
    which Megatron's unscaled embedding agrees with it.
    """
    theta = hf.rope.theta
    return {
        "vocab_size": padded_vocab(hf.vocab_size, tp_size, vocab_multiple),
        "max_sequence_length": hf.max_positions,
        "position_embedding_type": "yarn" if hf.rope.kind == "yarn" and hf.latent is None else "rope",
        "rotary_percent": hf.rope.fraction,
        "rotary_base": int(theta) if theta.is_integer() else theta,
        "rope_scaling": hf.rope.kind == "llama3",
        "rope_scaling_factor": hf.rope.factor if hf.rope.kind == "llama3" else 8.0,
        "seq_len_interpolation_factor": hf.rope.factor if hf.rope.kind == "linear" else None,
        "share_embeddings_and_output_weights": hf.tied,
    }


def megatron_lm_arguments(hf: HFConfig) -> dict[str, Any]:
    """The architecture as parsed arguments of Megatron-LM's training script.

    A checkpoint holds them under "args": Megatron-LM compares some when it loads (`check_checkpoint_args`) and takes
    the architecture from them with `--use-checkpoint-args` (megatron/training/checkpointing.py, seen in 0.16 to 0.19).
    """
    core, model = transformer_config(hf), gpt_model_kwargs(hf)
    same: tuple[str, ...] = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
    )
    same += ("normalization", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "attention_dropout", "hidden_dropout")
    return {
        **{key: core[key] for key in same},
        **{key: value for key, value in core.items() if key.startswith("moe_")},
        "num_experts": core.get("num_moe_experts"),
        "group_query_attention": True,
        "norm_epsilon": core["layernorm_epsilon"],
        "swiglu": hf.activation == "silu",
        "max_position_embeddings": model["max_sequence_length"],
        "position_embedding_type": model["position_embedding_type"],
        "add_position_embedding": False,
        "rotary_base": model["rotary_base"],
        "rotary_percent": model["rotary_percent"],
        "rotary_interleaved": hf.rope.interleaved,
        "apply_layernorm_1p": hf.norm_plus_one,
        "use_rope_scaling": model["rope_scaling"],
        "rope_scaling_factor": model["rope_scaling_factor"],
        "untie_embeddings_and_output_weights": not hf.tied,
        **latent_arguments(hf),
        "tensor_model_parallel_size": 1,  # of the checkpoint, which fits any
        "pipeline_model_parallel_size": 1,
    }


def inverse_frequencies(hf: HFConfig) -> Tensor | None:
    """(rotated channels / 2,) float32 to replace those of Megatron's rotary embedding; None if they agree.

    Of Llama 3's scaling GPTModel takes only the factor; the other constants are fixed. Formula:
    transformers, modeling_rope_utils.py `_compute_llama3_parameters`.
    """
    rope = hf.rope
    if rope.llama3 is None or rope.llama3 == Llama3Rope():
        return None
    channels = int(hf.head_dim * rope.fraction)
    plain = 1.0 / rope.theta ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    turns = plain * rope.llama3.original_positions / (2 * math.pi)  # within the original length
    low, high = rope.llama3.low_freq_factor, rope.llama3.high_freq_factor
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divided by the factor, 1: left alone
    return (1 - smooth) * plain / rope.factor + smooth * plain


def beyond_gpt_model(hf: HFConfig) -> list[str]:
    """Features of this model that Megatron-Core's GPTModel lacks. The learner's layers add them; others must too."""
    return [
        what
        for what, present in (
            ("norms after attention and MLP", hf.norms != "before"),
            ("an RMSNorm over all heads of queries and keys", hf.qk_norm_over_heads),
            ("norms of the latents whose epsilon is not that of the other norms", _own_latent_epsilon(hf)),
            ("constants that scale embedding, residual branches or logits", _scaled(hf)),
            ("rope constants other than Llama 3.1's", inverse_frequencies(hf) is not None),
            ("a rotary embedding of its own in layers with a window", hf.local_rope is not None),
            ("a gated tanh GELU without fused kernels", hf.activation == "gelu_tanh"),
        )
        if present
    ]


LATENT_EPSILON = 1e-6  # of the norms of the latents: transformers leaves it at the default of its RMSNorm


def _own_latent_epsilon(hf: HFConfig) -> bool:
    return hf.latent is not None and hf.norm_eps != LATENT_EPSILON


def _scaled(hf: HFConfig) -> bool:
    return (hf.embedding_scale, hf.residual_scale, hf.logits_divisor) != (1.0, 1.0, 1.0)


# What Megatron-LM's `load_args_from_checkpoint` does not restore (megatron/training/checkpointing.py, 0.16).
_FLAGS: tuple[str, ...] = ("qk_layernorm", "window_size", "window_attn_skip_freq", "no_rope_freq")
_FLAGS += ("moe_router_num_groups", "moe_router_group_topk", "moe_router_load_balancing_type", "moe_router_dtype")
_FLAGS += ("moe_router_bias_update_rate", "moe_shared_expert_gate")
_FLAGS += ("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_FLAGS += ("rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim")


def megatron_lm_flags(hf: HFConfig) -> list[str]:
    """Arguments for Megatron-LM's command line that `--use-checkpoint-args` leaves at their defaults."""
    flags = ["--use-checkpoint-args", f"--norm-epsilon {hf.norm_eps:g}", "--ckpt-format torch_dist"]
    config = transformer_config(hf)
    for key in _FLAGS:
        value, flag = config.get(key), "--" + key.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif value is not None and value is not False:
            written = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).replace(" ", "")
            flags.append(f"{flag} {shlex.quote(written)}")
    if gpt_model_kwargs(hf)["rope_scaling"]:
        flags += ["--use-rope-scaling", f"--rope-scaling-factor {hf.rope.factor:g}"]
    if hf.rope.kind == "linear":
        flags.append(f"--rotary-seq-len-interpolation-factor {hf.rope.factor:g}")
    return flags


def yarn_attributes(hf: HFConfig) -> dict[str, Any]:
    """Attributes to set on Megatron's `TransformerConfig`: GPTModel reads them there, though it declares none.

    Empty without YaRN: their presence alone changes attention. Megatron has no key for the attention factor, but with
    `mscale_all_dim` at 0 its own is 0.1 * mscale * ln(factor) + 1 (yarn_rotary_pos_embedding.py). Its fused rotary
    kernel ignores that factor for packed sequences: switch `apply_rope_fusion` off.
    """
    yarn = hf.rope.yarn
    if yarn is None or hf.latent is not None:
        return {}
    stretched = hf.rope.factor > 1
    return {
        "yarn_rotary_scaling_factor": hf.rope.factor,
        "yarn_original_max_position_embeddings": yarn.original_positions,
        "yarn_beta_fast": yarn.beta_fast,
        "yarn_beta_slow": yarn.beta_slow,
        "yarn_correction_range_round_to_int": yarn.truncate,
        "yarn_mscale": (yarn.attention_factor - 1) / (0.1 * math.log(hf.rope.factor)) if stretched else 0.0,
        "yarn_mscale_all_dim": 0.0,
    }
