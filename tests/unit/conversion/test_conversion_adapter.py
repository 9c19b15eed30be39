"""LoRA adapters: merged as PEFT defines them, or refused by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import SIZES, write_random

import conversion
from conversion import hf_to_megatron, megatron_to_hf

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **SIZES,
    "torch_dtype": "float32",
}
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
CHANGED = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return write_random(tmp_path / "base", RAW)


def write_adapter(directory: Path, **config: Any) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    shapes = conversion.hf_shapes(conversion.parse_config(RAW))
    state = {}
    for module in CHANGED:
        rows, columns = shapes[module + ".weight"]
        state[f"base_model.model.{module}.lora_A.weight"] = torch.randn(3, columns)
        state[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 3)
    save_file(state, directory / "adapter_model.safetensors")
    return directory


def merged(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    hf_to_megatron.convert(base, out, adapter=adapter, threads=2)
    megatron_to_hf.convert(out, out.with_name("back"))
    return load_file(out.with_name("back") / "model.safetensors")


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 2.0), (True, 6 / 3**0.5)])
def test_the_product_is_added_to_the_weights_it_belongs_to(
    base: Path, tmp_path: Path, stabilised: bool, scale: float
) -> None:
    adapter = write_adapter(tmp_path / "lora", use_rslora=stabilised)
    before, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    after = merged(base, adapter, tmp_path / "megatron")
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module in CHANGED:
            a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
            tensor = (tensor.double() + scale * (b @ a)).float()
        assert torch.allclose(after[name], tensor, rtol=1e-6, atol=1e-6), name
        assert module in CHANGED or torch.equal(after[name], before[name])
    assert "base + lora" in (tmp_path / "back" / "README.md").read_text()


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_the_result_is_that_of_peft(base: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:  # initialised to 0
                parameter.copy_(torch.randn_like(parameter))
    lora.save_pretrained(tmp_path / "lora")
    after = merged(base, tmp_path / "lora", tmp_path / "megatron")
    expected = lora.merge_and_unload().state_dict()
    assert after.keys() == expected.keys()
    assert all(torch.allclose(after[name], expected[name], rtol=1e-6, atol=1e-6) for name in after)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"lora_alpha": "16"}, "lora_alpha='16'"),
    ],
)
def test_what_is_more_than_a_product_is_refused_by_name(
    base: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        hf_to_megatron.convert(base, tmp_path / "out", adapter=write_adapter(tmp_path / "lora", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", (3, 16), "do not fit together"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (3, 37), "not a factor of a linear layer"),
        ("base_model.model.lm_head.lora_B.weight", (36, 3), r"lm_head.weight of shape \(36, 16\)"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    base: Path, tmp_path: Path, key: str, shape: tuple[int, ...], words: str
) -> None:
    adapter = write_adapter(tmp_path / "lora")
    state = load_file(adapter / "adapter_model.safetensors")
    save_file({**state, key: torch.zeros(shape)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=words):
        hf_to_megatron.convert(base, tmp_path / "out", adapter=adapter)


def test_a_directory_without_an_adapter_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        hf_to_megatron.convert(base, tmp_path / "out", adapter=base)
