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

from conversion.config import HFConfig, Rope, Yarn
from conversion.families import find_family

_LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


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
