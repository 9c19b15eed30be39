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
    llama3: Llama3Rope | None = None
    fraction: float = 1.0  # of each head that is rotated, its first channels
    interleaved: bool = False  # channels 2i and 2i + 1 turn together, not i and i + half


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Further parameters of Llama 3's scaling; `Rope.factor` divides the low frequencies."""

    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, slots=True)
class Yarn:
    """Further parameters of YaRN; `Rope.factor` is the extension of the sequence length."""

    original_positions: int  # trained length before the extension
    beta_fast: float  # rotations within it above which a frequency stays as it is
    beta_slow: float  # and below which it is divided by the factor
    truncate: bool  # the range between the two is rounded outwards to whole dimensions
    attention_factor: float  # multiplies cosine and sine
    mscale: float = 0.0  # latent attention only: their quotient is the attention factor, and the second scales scores
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, slots=True)
class Experts:
    """Mixture-of-experts shape."""

    count: int
    ffn_hidden_size: int
    top_k: int
    normalise_top_k: bool  # the chosen experts' probabilities are rescaled to sum to 1
    sparse_layers: tuple[bool, ...] = ()  # which layers have experts; empty: all
    shared_ffn_hidden_size: int = 0  # of the expert that every token passes; 0: there is none
    shared_gate: bool = False  # a sigmoid of the token scales the output of the shared expert
    sigmoid: bool = False  # scores are sigmoids, not a softmax
    score_bias: bool = False  # a learned bias is added to the scores for the choice alone
    groups: int = 1  # experts are chosen from the best `top_groups` groups
    top_groups: int = 1
    scaling: float = 1.0  # multiplies the weights of the chosen experts


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): widths of its projections, in channels.

    Queries and keys of a head have `plain` channels that no position turns and `rotated` ones; the keys' rotated
    channels are the same for all heads.
    """

    kv_rank: int  # of the latent from which keys and values are made
    plain: int
    rotated: int
    value: int  # of each head
    q_rank: int | None = None  # of the latent from which queries are made; None: they are projected at once


@dataclass(frozen=True, slots=True)
class HFConfig:
    """The properties of a Hugging Face model that conversion and the learner use. Sizes are element counts."""

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
    qk_norm: bool = False  # RMSNorm on queries and keys
    qk_norm_over_heads: bool = False  # over all heads together; else each head alone
    norms: str = "before"  # where attention and MLP are normalised: "before" | "after" | "both"
    norm_plus_one: bool = False  # norms multiply by 1 + weight
    activation: str = "silu"  # of the gate: "silu" | "gelu_tanh"
    no_rope_layers: tuple[bool, ...] = ()  # layers without rotary embedding; empty: none
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of the outputs of attention and MLP
    attention_scale: float | None = None  # of query times key; None: 1 / sqrt(head_dim)
    logits_divisor: float = 1.0
    window: int | None = None  # a token sees itself and the `window - 1` tokens before it
    window_layers: tuple[bool, ...] = ()  # which layers have the window; empty: all
    local_rope: Rope | None = None  # of the layers with the window; None: that of the others
    experts: Experts | None = None
    latent: Latent | None = None  # then `head_dim` is that of queries and keys

    @property
    def value_dim(self) -> int:
        """Channels of the values of a head."""
        return self.latent.value if self.latent else self.head_dim

    def sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and (not self.experts.sparse_layers or self.experts.sparse_layers[layer])

    @property
    def mixed(self) -> bool:
        """Whether the model has layers with and without experts: Megatron then numbers its layers."""
        return self.experts is not None and not all(self.experts.sparse_layers)

    def sizes(self) -> dict[str, int]:
        """The symbols in which the family tables write tensor shapes."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "2ffn": 2 * self.ffn_hidden_size,
            "one": 1,
            "shared_ffn": self.experts.shared_ffn_hidden_size if self.experts else 0,
            "q": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "head": self.head_dim,
            "experts": self.experts.count if self.experts else 0,
            "expert_ffn": self.experts.ffn_hidden_size if self.experts else 0,
            "v": self.num_heads * self.value_dim,
            **(self._latent_sizes() if self.latent else {}),
        }

    def _latent_sizes(self) -> dict[str, int]:
        assert self.latent is not None
        return {
            "q_latent": self.latent.q_rank or 0,
            "kv_latent": self.latent.kv_rank,
            "kv_down": self.latent.kv_rank + self.latent.rotated,
            "kv_up": self.num_heads * (self.latent.plain + self.latent.value),
        }
