"""A running learner's weights, streamed by name into a Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import conversion
from conversion.megatron_to_hf import write_hf

RAW = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(RAW))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


def stream(hf: conversion.HFConfig) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, requires_grad=True) for name, shape in conversion.hf_shapes(hf).items()}


def test_a_stream_in_any_order_becomes_a_complete_directory(model_dir: Path, tmp_path: Path) -> None:
    hf = conversion.read_config(model_dir)
    tensors = stream(hf)
    backwards = list(tensors.items())[::-1]
    write_hf(tmp_path / "out", hf, model_dir, backwards, torch.bfloat16, card={"step": 3, "base_model": "demo"})
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor.detach().bfloat16()) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**RAW, "torch_dtype": "bfloat16"}
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["step"] == 3 and manifest["tensors"].keys() == tensors.keys()


@pytest.mark.parametrize("problem", ["missing", "sender fails"])
def test_an_incomplete_stream_leaves_nothing(model_dir: Path, tmp_path: Path, problem: str) -> None:
    hf = conversion.read_config(model_dir)

    def broken():  # type: ignore[no-untyped-def]
        yield from list(stream(hf).items())[1:]
        if problem == "sender fails":
            raise RuntimeError("a rank died")

    expected = "not written completely: model.embed_tokens.weight" if problem == "missing" else "a rank died"
    with pytest.raises((ValueError, RuntimeError), match=expected):
        write_hf(tmp_path / "out", hf, model_dir, broken(), torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
