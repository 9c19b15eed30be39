"""A Hugging Face model configuration as one validated dataclass. `parse` reads it, `megatron_args` translates it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
