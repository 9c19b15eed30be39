"""Hugging Face `config.json`, read into one validated `HFConfig`.

Reads the dialects of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`). The text of the file is
kept in `HFConfig.raw`, so that exporting a checkpoint can give back exactly the config it came with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.config import HFConfig, Rope
from conversion.families import find_family
from conversion.fields import Fields
from conversion.locate import refuse_lfs_pointer
from conversion.rope import by_layer_in_dialect, mscale, read_rope

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
    width = head_dim or hidden // heads
    turned = config.integer("rotary_dim", default=width) if family.rotary == "partial" else width  # channels of a head
    config.only("hidden_act", "silu", "swish", why="every known family here uses silu")
    fields: dict[str, Any] = {
        "architecture": family.architecture,
        "raw": dict(raw),
        "num_layers": config.integer("num_hidden_layers", most=MOST_LAYERS),
        "hidden_size": hidden,
        "ffn_hidden_size": config.integer("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": width,
        "vocab_size": config.integer("vocab_size"),
        "max_positions": config.integer("max_position_embeddings"),
        "norm_eps": config.number("rms_norm_eps"),
        "rope": read_rope(config, family.rotary, turned / width),
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
    if not rope.yarn.truncate or rope.yarn.attention_factor != mscale(rope.factor, above) / mscale(rope.factor, below):
        raise ValueError(
            f"truncate={rope.yarn.truncate} with attention_factor={rope.yarn.attention_factor} is not supported with "
            "latent attention: Megatron truncates, and derives the factor from mscale and mscale_all_dim"
        )


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
    family = find_family(raw["architectures"][0])
    theta = family.defaults.get("rope_theta", 10000.0)
    if family.local_theta is not None:
        return by_layer_in_dialect(config, theta, family.local_theta, version)
    scaling = config.pop("rope_scaling", None) or {}
    rope = {"rope_theta": config.pop("rope_theta", theta), **scaling, **(config.pop("rope_parameters", None) or {})}
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    outside = config.pop("partial_rotary_factor", None)
    if (fraction := rope.pop("partial_rotary_factor", outside)) is not None:
        (rope if version == 5 else config)["partial_rotary_factor"] = fraction
    if version == 5:
        return config | {"rope_parameters": rope}
    theta = rope.pop("rope_theta")
    return config | {"rope_theta": theta, "rope_scaling": rope if rope["rope_type"] != "default" else None}
