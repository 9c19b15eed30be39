"""Requirements of FP8 on settings, model and GPU, checked before anything starts. See docs/gpu.md.

Pure functions over plain values, so tests without a GPU can cover any GPU.

Sources: Transformer Engine's support matrix (https://nvidia.github.io/TransformerEngine/support_matrix.html) and its
``pytorch/quantization.py`` (``_compute_*_support``, ``get_align_size_for_quantization``, ``assert_dim_for_fp8_exec``);
Megatron-Core's ``TransformerConfig.__post_init__``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_type_hints

from configs.layout import alignment, stage_layers
from configs.load import allowed
from configs.schema import Config, ModelConfig

if TYPE_CHECKING:
    import conversion

RECIPES = allowed(get_type_hints(ModelConfig)["fp8_recipe"])
# Lowest compute capability and CUDA version. MXFP8 has no kernels from 12.0 (workstation Blackwell) on.
_NEEDS = {
    "tensorwise": ((8, 9), (12, 1)),
    "delayed": ((8, 9), (12, 1)),
    "blockwise": ((9, 0), (12, 9)),
    "mxfp8": ((10, 0), (12, 8)),
}


def check_settings(config: Config) -> None:
    """Raises ValueError for settings that contradict each other."""
    m = config.model
    at_ends = {
        f"model.num_layers_at_{end}_in_bf16": value
        for end, value in (("start", m.num_layers_at_start_in_bf16), ("end", m.num_layers_at_end_in_bf16))
    }
    for key, value in at_ends.items():
        if value < 0:
            raise ValueError(f"{key}={value} must be at least 0")
        if value and m.fp8 is None:
            raise ValueError(f"{key}={value} has no effect without FP8: set model.fp8=e4m3 or unset it")
        if value and m.fp8_recipe == "delayed":
            raise ValueError(f"{key}={value} is not possible with model.fp8_recipe=delayed: choose blockwise")
    if m.fp8 is None:
        return
    if m.transformer_impl == "local":
        raise ValueError(f"model.fp8={m.fp8} needs Transformer Engine's layers: set model.transformer_impl=auto")
    if m.dtype != "bfloat16":
        raise ValueError(f"model.fp8={m.fp8} works on bfloat16 weights, not {m.dtype}: set model.dtype=bfloat16")


def check_model(config: Config, hf: conversion.HFConfig) -> None:
    """Raises ValueError for a model whose matrix sizes FP8 does not support in this layout, or too few layers."""
    m, tp, unit = config.model, config.parallel.tp, alignment(config)
    if m.fp8 is None:
        return
    # The embedding and the output layer stay in bfloat16, so the vocabulary does not matter.
    sizes = {
        "hidden size": hf.hidden_size,
        f"queries per rank ({hf.num_heads} heads x {hf.head_dim} / tp {tp})": hf.num_heads * hf.head_dim // tp,
        f"queries, keys and values per rank (tp {tp})": (hf.num_heads + 2 * hf.num_kv_heads) * hf.head_dim // tp,
    }
    if hf.experts is None:
        sizes[f"MLP width per rank ({hf.ffn_hidden_size} / tp {tp})"] = hf.ffn_hidden_size // tp
    else:
        sizes["width of an expert"] = hf.experts.ffn_hidden_size
    for what, size in sizes.items():
        if size % unit:
            raise ValueError(
                f"model.fp8={m.fp8} with {m.fp8_recipe} scaling needs a {what} that is a multiple of {unit}, not "
                f"{size}: choose another parallel.tp or set model.fp8=null"
            )
    stages = stage_layers(config.parallel, hf.num_layers)
    for key, layers in (("num_layers_at_start_in_bf16", stages[0]), ("num_layers_at_end_in_bf16", stages[-1])):
        if (value := getattr(m, key)) > layers:
            raise ValueError(f"model.{key}={value} exceeds the {layers} layers of a pipeline stage: lower it")


def possible(capability: tuple[int, int] | None, cuda: str | None) -> list[str]:
    """Recipes that a GPU of this compute capability can run with this version of CUDA."""
    if capability is None or cuda is None:
        return []
    version = tuple(map(int, cuda.split(".")[:2]))
    able = [name for name, (lowest, lowest_cuda) in _NEEDS.items() if capability >= lowest and version >= lowest_cuda]
    return [name for name in RECIPES if name in able and (name != "mxfp8" or capability < (12, 0))]


def check_device(config: Config, capability: tuple[int, int] | None, cuda: str | None, has_te: bool) -> None:
    """Raises ValueError unless this GPU supports ``model.fp8``.

    Args:
        capability: compute capability of the GPU, None without one.
        cuda: CUDA version of torch such as "13.0".
        has_te: Transformer Engine imports.
    """
    m = config.model
    if m.fp8 is None:
        return
    if capability is None:
        raise ValueError(f"model.fp8={m.fp8} needs an NVIDIA GPU, and there is none here: set model.fp8=null")
    if not has_te:
        raise ValueError(
            f"model.fp8={m.fp8} needs Transformer Engine, which is not installed (docs/gpu.md): install it, or set "
            "model.fp8=null"
        )
    lowest, lowest_cuda = _NEEDS[m.fp8_recipe]
    has = f"compute capability {capability[0]}.{capability[1]}"
    if m.fp8_recipe == "mxfp8" and not (10, 0) <= capability < (12, 0):
        raise ValueError(
            f"model.fp8_recipe=mxfp8 needs a data-center Blackwell GPU (compute capability 10.x), this one has {has}: "
            f"set model.fp8_recipe={'blockwise' if capability >= (9, 0) else 'tensorwise'}"
        )
    if capability < lowest:
        alternative = "model.fp8_recipe=tensorwise" if capability >= (8, 9) else "model.fp8=null"
        raise ValueError(
            f"model.fp8_recipe={m.fp8_recipe} needs compute capability {lowest[0]}.{lowest[1]}, this GPU has {has}: "
            f"set {alternative}"
        )
    if cuda is None or tuple(map(int, cuda.split(".")[:2])) < lowest_cuda:
        raise ValueError(
            f"model.fp8_recipe={m.fp8_recipe} needs CUDA {lowest_cuda[0]}.{lowest_cuda[1]}, torch was built with "
            f"{cuda}: install a newer torch, or set model.fp8_recipe=tensorwise"
        )
