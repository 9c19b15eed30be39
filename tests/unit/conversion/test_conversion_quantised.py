"""FP8 weights with a scale for every block are dequantised when read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import conversion
from conversion import hf_to_megatron, megatron_to_hf
from conversion.pickled import open_hf
from conversion.sources import open_source
from conversion.verify import compare

BLOCK = (4, 8)
RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 26,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)},
}
PART = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def state(tmp_path: Path) -> dict[str, Tensor]:
    """An FP8 checkpoint in tmp_path/fp8: the projections in 8 bits, the rest in bfloat16, like published ones."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, shape in conversion.hf_shapes(conversion.parse_config(RAW)).items():
        state[name] = torch.randn(shape).bfloat16()
        if "proj" in name:
            state[name] = (40 * torch.randn(shape)).to(torch.float8_e4m3fn)
            state[name + "_scale_inv"] = torch.rand([-(-n // b) for n, b in zip(shape, BLOCK, strict=True)]) / 40
    write(tmp_path / "fp8", state)
    return state


def write(directory: Path, state: dict[str, Tensor], **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**RAW, **config}))
    save_file(state, directory / "model.safetensors")
    return directory


def meant(state: dict[str, Tensor], name: str) -> Tensor:
    """Dequantise element by element."""
    if name + "_scale_inv" not in state:
        return state[name]
    wide, scales = state[name].float(), state[name + "_scale_inv"]
    for row in range(wide.shape[0]):
        for column in range(wide.shape[1]):
            wide[row, column] *= scales[row // BLOCK[0], column // BLOCK[1]]
    return wide.bfloat16()


def test_every_number_is_its_product_with_the_scale_of_its_block(state: dict[str, Tensor], tmp_path: Path) -> None:
    hf_to_megatron.convert(tmp_path / "fp8", tmp_path / "megatron", threads=2)
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == {name for name in state if not name.endswith("_scale_inv")}
    assert all(torch.equal(tensor, meant(state, name)) for name, tensor in back.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    for result in ("megatron", "back"):
        assert compare(open_source(tmp_path / "fp8"), open_source(tmp_path / result)).different == 0


def test_any_rows_can_be_read(state: dict[str, Tensor], tmp_path: Path) -> None:
    reader, expected = open_hf(tmp_path / "fp8"), meant(state, PART)
    for start in range(len(expected)):
        for stop in range(start + 1, len(expected) + 1):
            assert torch.equal(reader.rows(PART, start, stop), expected[start:stop])
    reader.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": None}, f"{PART} is stored in 8 bits, and .* has no {PART}_scale_inv"),
        ({"scale": torch.ones(3, 4)}, r"_scale_inv has shape \(3, 4\) where .* needs \(5, 4\)"),
        ({"quantization_config": None}, "weight_block_size=None of quantization_config .* must be two sizes"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq' .* is not supported"),
        ({"torch_dtype": "int8"}, "dtype='int8' in config.json must name the dtype"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    state: dict[str, Tensor], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    if "scale" in change:
        scale = change.pop("scale")
        del state[PART + "_scale_inv"]
        state |= {} if scale is None else {PART + "_scale_inv": scale}
    with pytest.raises(ValueError, match=message):
        hf_to_megatron.convert(write(tmp_path / "odd", state, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()
