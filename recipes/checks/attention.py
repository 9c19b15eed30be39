"""Refuse attention that Transformer Engine would compute from a whole matrix of scores.

Source: Transformer Engine 2.20.2, attention/dot_product_attention/utils.py, `get_attention_backend`. Without
determinism its fused kernels (cuDNN) take packed causal attention, with and without sliding windows, in bfloat16. With
``NVTE_ALLOW_NONDETERMINISTIC_ALGO=0`` cuDNN's backward for packed sequences asks on compute capability 9.0 for 128
bytes times batch x heads x length^2, so from 2^30 of these on it is not used; without flash-attn what remains is the
unfused kernel, which keeps all scores.
"""

from __future__ import annotations

import importlib.metadata
import os
import re

import torch

from configs.schema import Config
from conversion import HFConfig

MOST_SCORES = 1 << 30
FLASH_ATTN = ((2, 4, 1), (2, 8, 4))  # versions that Transformer Engine uses deterministically: from, up to
HOPPER = (9, 0)


def flash_attn_version() -> str | None:
    """Of the flash-attn package; vLLM's own copy of it does not count."""
    for name in ("flash-attn", "flash_attn"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def unfused_attention(config: Config, hf: HFConfig, capability: tuple[int, int], flash_attn: str | None) -> str:
    """What is wrong, and how to repair it, where deterministic attention of the longest sequence would be unfused."""
    heads, longest = hf.num_heads // config.parallel.tp, config.rollout.max_model_len
    lowest, highest = FLASH_ATTN
    if capability != HOPPER or heads * longest**2 < MOST_SCORES:
        return ""
    if flash_attn is not None and lowest <= tuple(map(int, re.findall(r"\d+", flash_attn)[:3])) <= highest:
        return ""
    return (
        f"NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 with rollout.max_model_len={longest} and {heads} heads a rank: "
        "Transformer Engine has no fused deterministic attention for packed sequences of that length on this GPU, and "
        "would keep all scores; install flash-attn 2.8.3 (docs/gpu.md), unset the variable, or raise parallel.tp"
    )


def check_attention(config: Config, hf: HFConfig) -> None:
    """Raises ValueError where this machine's Transformer Engine would fall back; for runs that use it."""
    if os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") != "0":
        return
    if problem := unfused_attention(config, hf, torch.cuda.get_device_capability(), flash_attn_version()):
        raise ValueError(problem)
