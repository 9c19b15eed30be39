"""Hugging Face directories of random weights, so small that converting one takes milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import conversion

SIZES: dict[str, int] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **SIZES,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}
QWEN2: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], **SIZES}


def write_random(directory: Path, raw: Mapping[str, Any] = LLAMA, dtype: torch.dtype = torch.float32) -> Path:
    """A directory with this config.json and weights for it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    shapes = conversion.hf_shapes(conversion.parse_config(raw))
    save_file({name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}, directory / "model.safetensors")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """The contents of every file below a directory."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
