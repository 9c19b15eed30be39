"""Alignment that FP8 matrix products ask of token counts and weight slices."""

from __future__ import annotations

from configs.schema import Config


def alignment(config: Config) -> int:
    """What the tokens of a micro-batch on one rank, and every dimension of a weight's slice, must be a multiple of."""
    if config.model.fp8 is None:
        return 1
    return 32 if config.model.fp8_recipe == "mxfp8" else 16
