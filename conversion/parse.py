"""Hugging Face `config.json`, read into one validated `HFConfig`.

Reads the dialects of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`). The text of the file is
kept in `HFConfig.raw`, so that exporting a checkpoint can give back exactly the config it came with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.config import HFConfig, Llama3Rope, Rope, Yarn
from conversion.families import find_family
from conversion.fields import Fields, shown
from conversion.locate import refuse_lfs_pointer

MOST_LAYERS = 10_000


def read_config(hf_dir: str | Path) -> HFConfig:
    """Read and validate `hf_dir/config.json`.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: not JSON, an unknown architecture, or a setting that Megatron cannot represent; says which.
    """
    return parse_config(read_raw(hf_dir))


def read_raw(hf_dir: str | Path) -> dict[str, Any]:
    """`hf_dir/config.json` as it is. FileNotFoundError or ValueError when there is none, or no JSON object."""
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a Hugging Face model directory with a config.json")
    refuse_lfs_pointer(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download the file again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not an object of names and values: download it again")
    return raw


def parse_config(raw: Mapping[str, Any]) -> HFConfig:
    """Validate a config that was already read from JSON; raises ValueError as `read_config` does."""
    architectures = Fields(raw).strings("architectures")
    family = find_family(architectures[0] if architectures else None)
    given = {key: value for key, value in raw.items() if value is not None or key not in family.defaults}
    config = Fields({**family.defaults, **given})
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    kv_heads = config.integer("num_key_value_heads", default=heads)
    head_dim = config.optional_integer("head_dim")
    if head_dim is None and hidden % heads:
        raise ValueError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}: set head_dim")
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    config.only("hidden_act", "silu", "swish", why="every known family here uses silu")
    fields: dict[str, Any] = {
        "architecture": family.architecture,
        "raw": dict(raw),
        "num_layers": config.integer("num_hidden_layers", most=MOST_LAYERS),
        "hidden_size": hidden,
        "ffn_hidden_size": config.integer("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": config.integer("vocab_size"),
        "max_positions": config.integer("max_position_embeddings"),
        "norm_eps": config.number("rms_norm_eps"),
        "rope": _rope(config, family.rotary),
        "tied": config.flag("tie_word_embeddings"),
    }
    hf = HFConfig(**{**fields, **family.options(config)})
    if hf.latent is not None:
        _check_latent_rope(hf.rope)
    return hf


def _check_latent_rope(rope: Rope) -> None:
    """Megatron's latent attention has a rotary embedding of its own, with fewer settings."""
    if rope.kind not in ("default", "yarn"):
        raise ValueError(f"rope_type={rope.kind} is not supported with latent attention: default and yarn are")
    if rope.yarn is None:
        return
    above, below = rope.yarn.mscale or 1.0, rope.yarn.mscale_all_dim
    if not rope.yarn.truncate or rope.yarn.attention_factor != _mscale(rope.factor, above) / _mscale(
        rope.factor, below
    ):
        raise ValueError(
            f"truncate={rope.yarn.truncate} with attention_factor={rope.yarn.attention_factor} is not supported with "
            "latent attention: Megatron truncates, and derives the factor from mscale and mscale_all_dim"
        )


def _rope(config: Fields, rotary: str) -> Rope:
    """transformers 5 keeps everything in `rope_parameters`, transformers 4 in `rope_theta` and `rope_scaling`."""
    both = {**config.section("rope_scaling"), **config.section("rope_parameters")}
    rope = Fields({"rope_theta": config.get("rope_theta"), **both}, "the rope parameters")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise ValueError(f"rope_type={shown(kind)} is not supported: default, linear, dynamic, llama3 and yarn are")
    fraction = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if fraction > 1 or (fraction != 1 and (rotary == "whole" or kind != "default")):
        raise ValueError(f"partial_rotary_factor={fraction} is not supported for this family, or not with {kind} RoPE")
    theta, factor = rope.number("rope_theta", 10000.0), rope.number("factor", 1.0, least=1.0, above=False)
    yarn = _yarn(rope, factor, config.integer("max_position_embeddings")) if kind == "yarn" else None
    llama3 = _llama3(rope) if kind == "llama3" else None
    return Rope(theta, kind, factor, yarn, llama3, fraction, interleaved=rotary == "partial, in pairs")


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
        attention = _mscale(factor, top) / _mscale(factor, bottom) if top and bottom else _mscale(factor, 1.0)
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


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def in_dialect(raw: Mapping[str, Any], version: int) -> dict[str, Any]:
    """A config as transformers 4 (`version=4`) or transformers 5 (`version=5`) writes it; the meaning is the same."""
    assert version in (4, 5), version
    config = dict(raw)
    renames = {"torch_dtype": "dtype"}  # from transformers 4 to 5
    if raw.get("architectures") == ["Qwen3MoeForCausalLM"]:
        renames["num_experts"] = "num_local_experts"
    for old, new in renames.items():
        source, target = (new, old) if version == 4 else (old, new)
        if source in config:
            config[target] = config.pop(source)
    scaling = config.pop("rope_scaling", None) or {}
    theta = find_family(raw["architectures"][0]).defaults.get("rope_theta", 10000.0)
    rope = {"rope_theta": config.pop("rope_theta", theta), **scaling, **(config.pop("rope_parameters", None) or {})}
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    outside = config.pop("partial_rotary_factor", None)
    if (fraction := rope.pop("partial_rotary_factor", outside)) is not None:
        (rope if version == 5 else config)["partial_rotary_factor"] = fraction
    if version == 5:
        return config | {"rope_parameters": rope}
    theta = rope.pop("rope_theta")
    return config | {"rope_theta": theta, "rope_scaling": rope if rope["rope_type"] != "default" else None}
