"""The autocast context, and rounding to float8 by the active recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Recipe

E4M3_MAX = 448.0


class FP8GlobalStateManager:
    recipe: Recipe | None = None
    seen: list[AmaxHistory] = []  # histories of the operands used since the context was entered

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None


class AmaxHistory:
    """Delayed-scaling state of one operand: recent largest magnitudes, newest first, and the scale in use."""

    def __init__(self, length: int) -> None:
        self.history, self.scale = torch.zeros(length), torch.tensor(1.0)

    def update(self) -> None:
        """Update on leaving the context in training: compute the next scale, and clear the slot for its magnitude."""
        largest = self.history.max()
        self.scale = torch.where(largest > 0, E4M3_MAX / largest, self.scale)
        self.history = self.history.roll(1)
        self.history[0] = 0.0


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Recipe | None = None, fp8_group: Any = None) -> Iterator[None]:
    manager = FP8GlobalStateManager
    before, manager.recipe = manager.recipe, fp8_recipe if enabled else None
    try:
        yield
    finally:
        manager.recipe = before
        if torch.is_grad_enabled():
            for operand in manager.seen:
                operand.update()
        manager.seen = []


@contextlib.contextmanager
def fp8_model_init(enabled: bool = True, recipe: Any = None) -> Iterator[None]:
    assert not enabled, "FP8 parameters are not emulated"
    yield


def rounded(x: Tensor, recipe: Recipe, state: AmaxHistory | None, *, weight: bool) -> Tensor:
    """``x`` (rows, columns) with values that float8 has, at the recipe's scale; gradients pass as if unrounded."""
    assert x.shape[0] % 8 == 0 and x.shape[1] % 16 == 0, f"FP8 products need multiples of 8 x 16, not {tuple(x.shape)}"
    value = x.detach().float()
    if isinstance(recipe, DelayedScaling):
        assert state is not None
        state.history[0] = torch.maximum(state.history[0], value.abs().max())
        FP8GlobalStateManager.seen.append(state)
        scale = state.scale
    elif isinstance(recipe, Float8CurrentScaling):
        scale = E4M3_MAX / value.abs().max().clamp_min(1e-12)
    else:
        assert isinstance(recipe, Float8BlockScaling), recipe
        scale = _block_scale(value, rows=128 if weight else 1)
    quantized = (value * scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() / scale
    return x + (quantized.to(x.dtype) - x).detach()


def _block_scale(x: Tensor, *, rows: int, columns: int = 128) -> Tensor:
    """Scale of every value, from the largest magnitude of its block."""
    pad = (0, -x.shape[1] % columns, 0, -x.shape[0] % rows)
    blocks = torch.nn.functional.pad(x.abs(), pad).unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    largest = blocks.amax((1, 3), keepdim=True).expand_as(blocks).flatten(2, 3).flatten(0, 1)
    return E4M3_MAX / largest[: x.shape[0], : x.shape[1]].clamp_min(1e-12)
