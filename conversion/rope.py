"""Rotary embeddings as config.json describes them.

transformers 5 keeps everything in `rope_parameters`, transformers 4 in `rope_theta` and `rope_scaling`. Families whose
layers differ have one set of parameters for each kind of layer.
"""

from __future__ import annotations

import math
from typing import Any

from conversion.config import Llama3Rope, Rope, Yarn
from conversion.fields import Fields, shown

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"  # transformers' names of the kinds of layers


def read_rope(config: Fields, rotary: str, fraction: float = 1.0) -> Rope:
    """The rotary embedding of a model. ValueError for one that Megatron cannot represent.

    Args:
        rotary: see `Family.rotary`.
        fraction: of each head that is rotated, where the config does not say.
    """
    both = {**config.section("rope_scaling"), **config.section("rope_parameters")}
    rope = Fields({"rope_theta": config.get("rope_theta"), **both}, "the rope parameters")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise ValueError(f"rope_type={shown(kind)} is not supported: default, linear, dynamic, llama3 and yarn are")
    fraction = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", fraction))
    if fraction > 1 or (fraction != 1 and (rotary.startswith("whole") or kind != "default")):
        raise ValueError(f"partial_rotary_factor={fraction} is not supported for this family, or not with {kind} RoPE")
    theta, factor = rope.number("rope_theta", 10000.0), rope.number("factor", 1.0, least=1.0, above=False)
    yarn = _yarn(rope, factor, config.integer("max_position_embeddings")) if kind == "yarn" else None
    llama3 = _llama3(rope) if kind == "llama3" else None
    return Rope(theta, kind, factor, yarn, llama3, fraction, interleaved=rotary.endswith("in pairs"))


def _llama3(rope: Fields) -> Llama3Rope:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise ValueError(f"rope parameter low_freq_factor={low} must be below high_freq_factor={high}")
    return Llama3Rope(low, high, rope.integer("original_max_position_embeddings"))


_YARN_KEYS = {"rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
_YARN_KEYS |= {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}


def _yarn(rope: Fields, factor: float, positions: int) -> Yarn:
    """As transformers' `_compute_yarn_parameters` reads it (modeling_rope_utils.py)."""
    if unknown := sorted(set(rope.values) - _YARN_KEYS):
        names = ", ".join(map(shown, unknown[:3]))
        raise ValueError(f"rope parameters {names} are not known together with YaRN: remove them")
    attention = rope.number("attention_factor", 0.0)
    top, bottom = (rope.number(key, 0.0, above=False) for key in ("mscale", "mscale_all_dim"))
    if rope.get("attention_factor") is None:
        attention = mscale(factor, top) / mscale(factor, bottom) if top and bottom else mscale(factor, 1.0)
    if factor == 1 and attention != 1:
        raise ValueError(f"attention_factor={attention} with factor=1 is not supported: Megatron derives one from both")
    return Yarn(
        original_positions=rope.integer("original_max_position_embeddings", default=positions),
        beta_fast=rope.number("beta_fast", 32.0, above=False) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0, above=False) or 1.0,
        truncate=rope.flag("truncate", True),
        attention_factor=attention,
        mscale=top,
        mscale_all_dim=bottom,
    )


def mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def local_and_global(config: Fields, *, local_theta: float, windowed: tuple[bool, ...]) -> dict[str, Any]:
    """Fields of `HFConfig` for a model whose layers with a window have a rotary embedding of their own.

    Args:
        local_theta: base of these layers where the config gives none.
    """
    both = config.section("rope_parameters")
    given = Fields(both, "rope_parameters")
    if not both.keys() <= {_GLOBAL, _LOCAL}:
        raise ValueError(
            f"rope_parameters={shown(both)} in config.json must have the parameters for {_GLOBAL} and {_LOCAL} layers"
        )
    beside = {key: config.get(key) for key in ("max_position_embeddings", "rope_scaling", "rope_theta")}
    everywhere = read_rope(Fields({**beside, "rope_parameters": given.section(_GLOBAL)}), "whole")
    beside |= {"rope_scaling": None, "rope_theta": local_theta}
    local = read_rope(Fields({**beside, "rope_parameters": given.section(_LOCAL)}), "whole")
    if local.kind != "default":
        raise ValueError(f"rope_type={local.kind} of {_LOCAL} layers is not supported: only default is")
    if all(windowed):
        return {"rope": local}
    return {"rope": everywhere, "local_rope": local if any(windowed) and local != everywhere else None}


def by_layer_in_dialect(config: dict[str, Any], theta: float, local_theta: float, version: int) -> dict[str, Any]:
    """`parse.in_dialect` for such a model; the two bases are those that its family has where the config gives none."""
    both, scaling = config.pop("rope_parameters", None) or {}, dict(config.pop("rope_scaling", None) or {})
    usual = {"rope_theta": config.pop("rope_theta", theta), "rope_type": scaling.pop("type", "default")}
    everywhere = {**usual, **scaling, **(both.get(_GLOBAL) or {})}
    usual = {"rope_theta": config.pop("rope_local_base_freq", local_theta), "rope_type": "default"}
    local = {**usual, **(both.get(_LOCAL) or {})}
    if version == 5:
        return config | {"rope_parameters": {_GLOBAL: everywhere, _LOCAL: local}}
    if local["rope_theta"] != local_theta:
        config["rope_local_base_freq"] = local["rope_theta"]
    theta = everywhere.pop("rope_theta")
    return config | {"rope_theta": theta, "rope_scaling": everywhere if everywhere["rope_type"] != "default" else None}
