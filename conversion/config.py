"""Hugging Face `config.json`, read into one validated dataclass, and what it means for Megatron-Core.

Reads the dialects of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`). The text of the file is
kept in `HFConfig.raw`, so that exporting a checkpoint can give back exactly the config it came with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: base frequency and scaling, in the terms of transformers' `rope_parameters`."""

    theta: float
    kind: str = "default"  # "default" | "linear" | "dynamic" | "llama3" | "yarn"
    factor: float = 1.0
    yarn: Yarn | None = None


@dataclass(frozen=True, slots=True)
class Yarn:
    """What else YaRN needs; `Rope.factor` is how much longer sequences became."""

    original_positions: int  # trained length before the extension
    beta_fast: float  # rotations within it above which a frequency stays as it is
    beta_slow: float  # and below which it is divided by the factor
    truncate: bool  # the range between the two is rounded outwards to whole dimensions
    attention_factor: float  # multiplies cosine and sine


@dataclass(frozen=True, slots=True)
class Experts:
    """Mixture-of-experts shape; every layer of a supported family is sparse."""

    count: int
    ffn_hidden_size: int
    top_k: int
    normalise_top_k: bool  # the chosen experts' probabilities are rescaled to sum to 1


@dataclass(frozen=True, slots=True)
class HFConfig:
    """What conversion and the learner need to know about a Hugging Face model. Sizes are element counts."""

    architecture: str
    raw: Mapping[str, Any] = field(hash=False)  # config.json as read
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: Rope
    tied: bool  # the output projection is the embedding table
    qkv_bias: bool = False
    linear_bias: bool = False  # bias on the attention output and on both MLP projections
    qk_norm: bool = False  # per-head RMSNorm on queries and keys
    window: int | None = None  # a token sees itself and the `window - 1` tokens before it
    window_layers: tuple[bool, ...] = ()  # which layers have the window; empty: all
    experts: Experts | None = None

    def sizes(self) -> dict[str, int]:
        """The symbols in which the family tables write tensor shapes."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "q": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "head": self.head_dim,
            "experts": self.experts.count if self.experts else 0,
            "expert_ffn": self.experts.ffn_hidden_size if self.experts else 0,
        }


def read_config(hf_dir: str | Path) -> HFConfig:
    """Read and validate `hf_dir/config.json`.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: not JSON, an unknown architecture, or a setting that Megatron cannot represent; says which.
    """
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a Hugging Face model directory with a config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download the file again") from error
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> HFConfig:
    """Validate a config that was already read from JSON; raises ValueError as `read_config` does."""
    from conversion.families import find_family  # families describe themselves in terms of this module

    architectures = raw.get("architectures") or [None]
    family = find_family(architectures[0])
    config = {**family.defaults, **raw}
    heads = _positive(config, "num_attention_heads")
    hidden = _positive(config, "hidden_size")
    kv_heads = heads if config.get("num_key_value_heads") is None else _positive(config, "num_key_value_heads")
    own_head_dim = config.get("head_dim") is not None
    if not own_head_dim and hidden % heads:
        raise ValueError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}: set head_dim")
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act={config['hidden_act']!r} is not supported: every known family here uses silu")
    return HFConfig(
        architecture=family.architecture,
        raw=dict(raw),
        num_layers=_positive(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_positive(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_positive(config, "head_dim") if own_head_dim else hidden // heads,
        vocab_size=_positive(config, "vocab_size"),
        max_positions=_positive(config, "max_position_embeddings"),
        norm_eps=float(config["rms_norm_eps"]),
        rope=_rope(config),
        tied=bool(config["tie_word_embeddings"]),
        **family.options(config),
    )


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key}={value!r} in config.json must be a positive integer")
    return value


def _rope(config: Mapping[str, Any]) -> Rope:
    """transformers 5 keeps everything in `rope_parameters`, transformers 4 in `rope_theta` and `rope_scaling`."""
    old_dialect = config.get("rope_scaling") or {}
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **old_dialect, **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise ValueError(
            f"rope_type={kind!r} is not supported: use default, linear, dynamic, llama3 or yarn, or remove the scaling "
            "from config.json if sequences stay within the original length"
        )
    if kind == "llama3":
        # GPTModel takes only the factor; the other three are constants in its RotaryEmbedding._apply_scaling.
        for key, fixed in _LLAMA3_FIXED.items():
            if rope.get(key) != fixed:
                raise ValueError(
                    f"rope parameter {key}={rope.get(key)!r} is not supported: Megatron fixes it at {fixed}"
                )
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor={partial} is not supported: only full rotary embeddings are")
    theta, factor = float(rope["rope_theta"]), float(rope.get("factor", 1.0))
    if theta <= 0 or factor < 1:
        raise ValueError(f"rope_theta={theta} must be positive and rope factor={factor} at least 1")
    return Rope(theta, kind, factor, _yarn(rope, factor, config["max_position_embeddings"]) if kind == "yarn" else None)


_YARN_KEYS = {"rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
_YARN_KEYS |= {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}


def _yarn(rope: Mapping[str, Any], factor: float, positions: int) -> Yarn:
    """As transformers' `_compute_yarn_parameters` reads it (modeling_rope_utils.py)."""
    if unknown := sorted(set(rope) - _YARN_KEYS):
        raise ValueError(f"rope parameters {', '.join(unknown)} are not known together with YaRN: remove them")
    attention = rope.get("attention_factor")
    if attention is None:
        top, bottom = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = _mscale(factor, top) / _mscale(factor, bottom) if top and bottom else _mscale(factor, 1.0)
    if factor == 1 and attention != 1:
        raise ValueError(f"attention_factor={attention} with factor=1 is not supported: Megatron derives one from both")
    return Yarn(
        original_positions=rope.get("original_max_position_embeddings") or positions,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=float(attention),
    )


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def in_dialect(raw: Mapping[str, Any], version: int) -> dict[str, Any]:
    """A config as transformers 4 (`version=4`) or transformers 5 (`version=5`) writes it; the meaning is the same."""
    assert version in (4, 5), version
    config = dict(raw)
    old_names, new_names = ("torch_dtype", "num_experts"), ("dtype", "num_local_experts")
    renames = zip(new_names, old_names, strict=True) if version == 4 else zip(old_names, new_names, strict=True)
    for source, target in renames:
        if source in config:
            config[target] = config.pop(source)
    scaling = config.pop("rope_scaling", None) or {}
    rope = {"rope_theta": config.pop("rope_theta", 10000.0), **scaling, **(config.pop("rope_parameters", None) or {})}
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    if version == 5:
        return config | {"rope_parameters": rope}
    theta = rope.pop("rope_theta")
    return config | {"rope_theta": theta, "rope_scaling": rope if rope["rope_type"] != "default" else None}


def transformer_config(hf: HFConfig) -> dict[str, Any]:
    """Keyword arguments for `megatron.core.transformer.TransformerConfig` that follow from the architecture.

    `activation_func` is given by name ("silu"): this module does not import what it does not need. Dropout is 0, as
    reinforcement learning requires (old and new log-probabilities must come from the same function).
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
        "qk_layernorm": hf.qk_norm,
        "gated_linear_unit": True,
        "activation_func": "silu",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if hf.window is not None and hf.window < hf.max_positions:
        # Megatron counts the tokens to the left of the current one; Hugging Face counts the current one too.
        kwargs["window_size"] = (hf.window - 1, 0)
        if hf.window_layers and not all(hf.window_layers):
            kwargs["window_attn_skip_freq"] = [int(windowed) for windowed in hf.window_layers]
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
    return kwargs


def gpt_model_kwargs(hf: HFConfig, tp_size: int = 1, vocab_multiple: int = 1) -> dict[str, Any]:
    """Keyword arguments for `megatron.core.models.gpt.GPTModel` that follow from the architecture.

    `vocab_size` is padded to a multiple of `tp_size * vocab_multiple` (see `sharding.padded_vocab`): logits of the
    columns from `hf.vocab_size` on belong to no token and must be left out of every softmax. With dynamic RoPE
    scaling, `max_sequence_length` is the length up to which the scaling changes nothing, which is the only range in
    which Megatron's unscaled embedding agrees with it.
    """
    from conversion.sharding import padded_vocab

    theta = hf.rope.theta
    return {
        "vocab_size": padded_vocab(hf.vocab_size, tp_size, vocab_multiple),
        "max_sequence_length": hf.max_positions,
        "position_embedding_type": "yarn" if hf.rope.kind == "yarn" else "rope",
        "rotary_percent": 1.0,
        "rotary_base": int(theta) if theta.is_integer() else theta,
        "rope_scaling": hf.rope.kind == "llama3",
        "rope_scaling_factor": hf.rope.factor if hf.rope.kind == "llama3" else 8.0,
        "seq_len_interpolation_factor": hf.rope.factor if hf.rope.kind == "linear" else None,
        "share_embeddings_and_output_weights": hf.tied,
    }


def yarn_attributes(hf: HFConfig) -> dict[str, Any]:
    """Attributes to set on Megatron's `TransformerConfig`: GPTModel reads them there, though it declares none.

    Empty without YaRN: their presence alone changes attention. Megatron has no key for the attention factor, but with
    `mscale_all_dim` at 0 its own is 0.1 * mscale * ln(factor) + 1 (yarn_rotary_pos_embedding.py). Its fused rotary
    kernel ignores that factor for packed sequences: switch `apply_rope_fusion` off.
    """
    yarn = hf.rope.yarn
    if yarn is None:
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
