"""Precision on a GPU: Transformer Engine against Megatron's layers, and FP8 against bfloat16.

The figures are printed (`pytest -s`), because they are worth more than that they pass. Thresholds: users of comparable
systems call a mean |dp| below 0.005 fine and above 0.01 bad; the random model here is harder than a trained one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Config
from recipes.checks import fp8

pytestmark = pytest.mark.usefixtures("transformer_engine", "alone")
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": 4}
SCALINGS = ("blockwise", "tensorwise", "delayed", "mxfp8")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import parity

    return parity.random_model(tmp_path_factory.mktemp("precision") / "model", "qwen2", **SIZES)


def show(name: str, **values: Any) -> None:
    print(json.dumps({"test": name, "device": torch.cuda.get_device_name(), **values}))


def fp8_settings(scaling: str, **more: Any) -> Config:
    """Skips what this GPU cannot do, with the sentence a user would get."""
    import parity

    config = parity.settings("bfloat16", "transformer_engine", fp8="e4m3", fp8_recipe=scaling, **more)
    try:
        fp8.check_device(config, torch.cuda.get_device_capability(), torch.version.cuda, has_te=True)
    except ValueError as error:
        pytest.skip(str(error))
    return config


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "qwen3_moe"])
def test_transformer_engine_equals_our_layers_in_bfloat16(architecture: str, tmp_path: Path) -> None:
    """Both against our layers in float32: Transformer Engine must be no worse than bfloat16 itself."""
    import parity

    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 64}
    extra = {"qwen2": {}, "qwen3": {"head_dim": 64}, "qwen3_moe": moe}[architecture]
    directory = parity.random_model(tmp_path / "model", architecture, **SIZES, **extra)
    exact = parity.measure(parity.settings("float32", "local"), directory)
    error = {
        impl: parity.differences(parity.measure(parity.settings("bfloat16", impl), directory), exact)
        for impl in ("local", "transformer_engine")
    }
    show("layers", architecture=architecture, **error)
    ours, te = error["local"], error["transformer_engine"]
    for key in ("mean |dlogp|", "mean |dp|", "mean |dH|", "mean |dsum p2|"):
        assert te[key] < 2 * ours[key] + 1e-4, key
    assert te["gradient cosine"] > 0.99 and abs(te["gradient norm"]) < 0.05


@pytest.mark.parametrize("scaling", SCALINGS)
def test_fp8_log_probabilities_entropy_and_gradients(scaling: str, model_dir: Path) -> None:
    import parity

    config = fp8_settings(scaling)
    bf16 = parity.measure(parity.settings("bfloat16", "transformer_engine"), model_dir)
    found = parity.differences(parity.measure(config, model_dir), bf16)
    show("fp8", scaling=scaling, **found)
    assert found["mean |dp|"] < 0.02 and found["mean |dlogp|"] < 0.3
    assert found["mean |dH|"] < 0.1 and found["dH of the batch"] < 0.05
    assert found["gradient cosine"] > 0.9 and abs(found["gradient norm"]) < 0.3


@pytest.mark.parametrize("scaling", SCALINGS)
def test_fp8_importance_ratio_is_1_while_weights_do_not_move(scaling: str, model_dir: Path) -> None:
    """The statistics pass and the training pass are the same function. Delayed scaling's is not: its scales move."""
    import parity

    for budget in (256, 32):
        config = fp8_settings(scaling, micro_batch_tokens=budget)
        found = parity.ratio_at_rate_0(parity.measure(config, model_dir))
        show("ratio", scaling=scaling, micro_batch_tokens=budget, **found)
        if scaling != "delayed":
            assert found["max |log r|"] < 0.02 and found["clip fraction"] == 0.0


def test_blockwise_scaling_does_not_depend_on_the_packing(model_dir: Path) -> None:
    """Up to the order of sums, which differs between products of different size; tensorwise scaling is far above."""
    import parity

    found = {}
    for scaling in ("blockwise", "tensorwise"):
        wide, narrow = (
            parity.measure(fp8_settings(scaling, micro_batch_tokens=tokens), model_dir) for tokens in (256, 32)
        )
        found[scaling] = parity.differences(wide, narrow)["mean |dlogp|"]
    show("packing", **found)
    assert found["blockwise"] < found["tensorwise"] / 2


def test_layers_kept_in_bfloat16_reduce_the_error(model_dir: Path) -> None:
    import parity

    bf16 = parity.measure(parity.settings("bfloat16", "transformer_engine"), model_dir)
    ends = {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}
    all_fp8, kept = (parity.measure(fp8_settings("blockwise", **more), model_dir) for more in ({}, ends))
    errors = [parity.differences(found, bf16)["mean |dlogp|"] for found in (all_fp8, kept)]
    show("first and last layers", all_fp8=errors[0], kept_in_bfloat16=errors[1])
    assert errors[1] < errors[0]
