"""Settings, models and GPUs that the FP8 check refuses before the run starts; the check needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest

import conversion
from configs.layout import alignment
from configs.schema import Config, ModelConfig, ParallelConfig
from recipes.checks import fp8
from recipes.checks.settings import load_checked

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
QWEN_MOE = QWEN_7B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
H100, ADA, AMPERE, B200, RTX_PRO = (9, 0), (8, 9), (8, 0), (10, 0), (12, 0)


def make(tp: int = 1, pp: int = 1, **model: Any) -> Config:
    return Config(
        model=ModelConfig(**{"dtype": "bfloat16", "fp8": "e4m3", **model}), parallel=ParallelConfig(tp=tp, pp=pp)
    )


def test_without_fp8_nothing_is_asked() -> None:
    config = Config()
    fp8.check_settings(config)
    fp8.check_model(config, conversion.parse_config(QWEN_7B | {"hidden_size": 28, "intermediate_size": 3}))
    fp8.check_device(config, None, None, has_te=False)
    assert alignment(config) == 1


@pytest.mark.parametrize("scaling", fp8.RECIPES)
def test_alignment_is_that_of_the_blocks(scaling: str) -> None:
    """MXFP8 has one scale per 32 values; the other products need multiples of 16."""
    assert alignment(make(fp8_recipe=scaling)) == (32 if scaling == "mxfp8" else 16)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model.fp8=e4m3"], ["model.fp8=e4m3", "float32", "model.dtype=bfloat16"]),
        (["model.fp8=e5m2", "model.dtype=bfloat16"], ["model.fp8=e5m2", "e4m3 | hybrid"]),
        (["model.fp8_recipe=current"], ["model.fp8_recipe=current", "tensorwise"]),
        (["model.num_layers_at_end_in_bf16=1"], ["model.num_layers_at_end_in_bf16=1", "model.fp8=e4m3"]),
        (["model.num_layers_at_start_in_bf16=-1"], ["model.num_layers_at_start_in_bf16=-1", "at least 0"]),
        (
            ["model.fp8=hybrid", "model.dtype=bfloat16", "model.transformer_impl=local"],
            ["model.fp8=hybrid", "model.transformer_impl=auto"],
        ),
        (
            "model.fp8=hybrid model.dtype=bfloat16 model.fp8_recipe=delayed model.num_layers_at_end_in_bf16=1".split(),
            ["model.num_layers_at_end_in_bf16=1", "delayed", "blockwise"],
        ),
        (["model.transformer_impl=te"], ["model.transformer_impl=te", "transformer_engine"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused(arguments: list[str], said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_checked(arguments)
    for words in said:
        assert words in str(error.value)


def test_settings_of_the_command_line_are_accepted() -> None:
    load_checked(["model.fp8=hybrid", "model.dtype=bfloat16", "model.fp8_recipe=tensorwise"])
    load_checked(["model.fp8=e4m3", "model.dtype=bfloat16", "model.num_layers_at_start_in_bf16=2"])


def test_a_model_whose_slices_are_no_multiples_is_refused() -> None:
    model = conversion.parse_config(QWEN_7B)
    for tp in (1, 2, 4):
        fp8.check_model(make(tp=tp), model)
    odd = conversion.parse_config(QWEN_7B | {"intermediate_size": 18944 + 16})  # 9480 = 16 x 592.5 on each of two ranks
    fp8.check_model(make(tp=1), odd)
    with pytest.raises(ValueError, match=r"MLP width per rank.* multiple of 16, not 9480: choose another parallel.tp"):
        fp8.check_model(make(tp=2), odd)


def test_experts_count_with_their_own_width() -> None:
    fp8.check_model(make(tp=4), conversion.parse_config(QWEN_MOE | {"intermediate_size": 3}))
    with pytest.raises(ValueError, match="width of an expert that is a multiple of 32, not 784"):
        fp8.check_model(make(fp8_recipe="mxfp8"), conversion.parse_config(QWEN_MOE | {"moe_intermediate_size": 784}))


def test_layers_in_bfloat16_must_fit_a_pipeline_stage() -> None:
    model = conversion.parse_config(QWEN_7B)
    fp8.check_model(make(pp=4, num_layers_at_end_in_bf16=7), model)
    with pytest.raises(ValueError, match="model.num_layers_at_end_in_bf16=8 exceeds the 7 layers of a pipeline stage"):
        fp8.check_model(make(pp=4, num_layers_at_end_in_bf16=8), model)


@pytest.mark.parametrize(
    ("scaling", "capability", "cuda", "said"),
    [
        ("mxfp8", H100, "13.0", "mxfp8 needs a data-center Blackwell GPU .*9.0: set model.fp8_recipe=blockwise"),
        ("mxfp8", ADA, "13.0", "mxfp8 .*8.9: set model.fp8_recipe=tensorwise"),
        ("mxfp8", RTX_PRO, "13.0", "mxfp8 .*12.0: set model.fp8_recipe=blockwise"),
        ("blockwise", ADA, "13.0", "blockwise needs compute capability 9.0, .*8.9: set model.fp8_recipe=tensorwise"),
        ("blockwise", H100, "12.8", "blockwise needs CUDA 12.9, torch was built with 12.8"),
        ("tensorwise", AMPERE, "13.0", "tensorwise needs compute capability 8.9, .*8.0: set model.fp8=null"),
        ("delayed", AMPERE, "13.0", "delayed needs compute capability 8.9"),
        ("blockwise", None, "13.0", "needs an NVIDIA GPU"),
    ],
)
def test_a_gpu_that_cannot_is_refused(scaling: str, capability: tuple[int, int] | None, cuda: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fp8.check_device(make(fp8_recipe=scaling), capability, cuda, has_te=True)


@pytest.mark.parametrize(
    ("scaling", "capability", "cuda"),
    [("blockwise", H100, "12.9"), ("tensorwise", ADA, "12.1"), ("delayed", H100, "12.4"), ("mxfp8", B200, "13.0")],
)
def test_a_gpu_that_can_is_accepted_but_not_without_transformer_engine(
    scaling: str, capability: tuple[int, int], cuda: str
) -> None:
    config = make(fp8_recipe=scaling)
    fp8.check_device(config, capability, cuda, has_te=True)
    with pytest.raises(ValueError, match="Transformer Engine"):
        fp8.check_device(config, capability, cuda, has_te=False)
