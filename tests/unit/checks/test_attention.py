"""Deterministic attention that Transformer Engine would not fuse."""

from __future__ import annotations

from dataclasses import replace

import pytest

import conversion
from configs.schema import Config, ParallelConfig, RolloutConfig
from recipes.checks.attention import unfused_attention
from recipes.plan import GENERATED_MODELS

MODEL = replace(conversion.parse_config(GENERATED_MODELS["tiny"]), num_heads=28)


@pytest.mark.parametrize(
    ("length", "tp", "capability", "flash_attn", "refused"),
    [
        (8192, 1, (9, 0), None, True),  # 28 x 2^26 scores
        (6193, 1, (9, 0), None, True),  # 28 x 6193^2 is just above 2^30
        (6192, 1, (9, 0), None, False),
        (8192, 4, (9, 0), None, False),  # 7 x 2^26
        (8192, 1, (10, 0), None, False),
        (8192, 1, (9, 0), "2.8.3.post2", False),
        (8192, 1, (9, 0), "2.3.6", True),
        (8192, 1, (9, 0), "2.9.0", True),
    ],
)
def test_what_is_refused(
    length: int, tp: int, capability: tuple[int, int], flash_attn: str | None, refused: bool
) -> None:
    config = Config(rollout=RolloutConfig(max_model_len=length), parallel=ParallelConfig(tp=tp))
    problem = unfused_attention(config, MODEL, capability, flash_attn)
    assert bool(problem) == refused
    if refused:
        assert (
            f"rollout.max_model_len={length} and {28 // tp} heads" in problem and "install flash-attn 2.8.3" in problem
        )
