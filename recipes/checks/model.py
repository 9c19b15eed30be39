"""Refuse a layout, lengths or a precision that the model or this machine does not allow."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import torch

import conversion
from configs.schema import Config, ParallelConfig
from conversion import HFConfig
from recipes.checks import fp8


def check_device(config: Config) -> None:
    """Refuse a precision that this machine's GPU, or its absence, does not allow. Raises ValueError."""
    if config.model.fp8 is None:
        return
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    has_te = importlib.util.find_spec("transformer_engine") is not None
    fp8.check_device(config, capability, torch.version.cuda, has_te)


def check_model(config: Config, directory: Path) -> None:
    """Refuse a layout, lengths or a precision that the model does not allow. Raises ValueError."""
    hf, p = conversion.read_config(directory), config.parallel
    for what, size in (("attention heads", hf.num_heads), ("MLP columns", hf.ffn_hidden_size)):
        if size % p.tp:
            raise ValueError(f"parallel.tp={p.tp} does not divide the model's {size} {what}; choose a divisor")
    if hf.num_kv_heads % p.tp and p.tp % hf.num_kv_heads:
        raise ValueError(
            f"parallel.tp={p.tp} is neither a divisor nor a multiple of the model's {hf.num_kv_heads} key-value heads; "
            "choose one"
        )
    if hf.num_layers % (p.pp * p.vpp):
        raise ValueError(
            f"parallel.pp={p.pp} x parallel.vpp={p.vpp} does not divide the model's {hf.num_layers} layers"
        )
    _check_experts(hf, p)
    _check_window(config, hf)
    fp8.check_model(config, hf)
    if config.reference.path is not None:  # it runs in the policy's place: see megatron_ext/learner/reference.py
        other = conversion.read_config(Path(config.reference.path))
        if replace(other, raw=hf.raw, max_positions=hf.max_positions) != hf:
            raise ValueError(
                f"reference.path={config.reference.path} is another model than the policy ({other.architecture}, "
                f"{hf.architecture}, or their sizes): give a checkpoint of the same model, or unset it"
            )
    if config.rollout.max_model_len > hf.max_positions:
        raise ValueError(
            f"rollout.max_model_len={config.rollout.max_model_len} exceeds the model's {hf.max_positions} positions"
        )


def _check_experts(hf: HFConfig, p: ParallelConfig) -> None:
    if hf.experts is None:
        if p.ep > 1:
            raise ValueError(f"parallel.ep={p.ep}: the model has no experts; drop parallel.ep")
        return
    if hf.experts.count % p.ep:
        raise ValueError(f"parallel.ep={p.ep} does not divide the model's {hf.experts.count} experts; choose a divisor")
    if p.tp > 1 and not p.sp:
        raise ValueError(f"parallel.tp={p.tp} with a mixture of experts needs sequence parallelism: parallel.sp=true")


def _check_window(config: Config, hf: HFConfig) -> None:
    """Sliding windows need Transformer Engine, and whole sequences; those that fit into a window need nothing."""
    model, longest = config.model, config.rollout.max_model_len
    has_te = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    local = model.transformer_impl == "local" or model.dtype != "bfloat16" or not has_te
    if hf.window is not None and longest > hf.window and (local or config.parallel.cp > 1):
        raise ValueError(
            f"rollout.max_model_len={longest} exceeds the model's sliding window of {hf.window} tokens, which needs "
            "Transformer Engine's attention (bfloat16, on a GPU) and parallel.cp=1: set "
            f"rollout.max_model_len={hf.window} at most"
        )
