"""Training with a critic: its loss, its targets, and the scaling of its advantages.

Tensors are flat over response tokens, (T,), in sample order. Source: Entropy Dynamics app. E.4, which prints only the
recursion of GAE (`advantages.gae`); our own choices are marked.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_ext.rl.params import check_number, suggest

GAE_PARAMS = ("gamma", "lam")


def check_gae(params: Mapping[str, object]) -> None:
    """Raise ValueError, naming the key, unless these are parameters of `advantages.gae`."""
    for key, value in params.items():
        if key not in GAE_PARAMS:
            raise ValueError(
                f"advantage.params.{key}={value!r} is not a parameter of 'gae'{suggest(key, GAE_PARAMS)}; "
                f"it takes {', '.join(GAE_PARAMS)}."
            )
        check_number(f"advantage.params.{key}", value, 0, 1)


def last_token_rewards(rewards_B: Tensor, offsets: Tensor) -> Tensor:
    """The reward of a response on its last token, 0 on the others, float64 (T,).

    ``offsets``: (B + 1,) int64, start of each response in the flat tensors, and T. Every response has a token.
    """
    assert bool((offsets.diff() > 0).all()), "a response without tokens cannot carry its reward"
    rewards_T = torch.zeros(int(offsets[-1]), dtype=torch.float64)
    rewards_T[offsets[1:] - 1] = rewards_B.double()
    return rewards_T


def whiten(advantages_T: Tensor, mask_T: Tensor, *, delta: float = 1e-8) -> Tensor:
    """(A - mean) / (std + delta) with mean and population std over the masked tokens of the batch; 0 elsewhere.

    Our choice: Entropy Dynamics does not say whether advantages are scaled; public PPO recipes for language models
    whiten them in this way.
    """
    chosen = advantages_T[mask_T]
    if not chosen.numel():
        return torch.zeros_like(advantages_T)
    centred = advantages_T - chosen.mean()
    return torch.where(mask_T, centred / (chosen.std(unbiased=False) + delta), 0.0)


def value_loss(
    values_T: Tensor, returns_T: Tensor, old_values_T: Tensor, *, clip_range: float | None = None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of each value, optionally clipped around the value before the update.

    L = 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2). If the second term is larger, V has left the interval
    towards R, the bound is a constant, and the token has no gradient. The factor 1/2 and the maximum follow Schulman et
    al.'s PPO implementation; Entropy Dynamics prints no value loss.

    Args:
        values_T: V, differentiable. ``returns_T``, ``old_values_T`` are constants.
        clip_range: c, in units of reward; None: no clipping.
    Returns:
        loss per token, and bool per token: clipped, so without gradient. No aggregation.
    """
    square = (values_T - returns_T).square()
    if clip_range is None:
        return square / 2, torch.zeros_like(values_T, dtype=torch.bool)
    bounded = torch.minimum(torch.maximum(values_T, old_values_T - clip_range), old_values_T + clip_range)
    bounded_square = (bounded.detach() - returns_T).square()
    clipped = bounded_square > square
    return torch.where(clipped, bounded_square, square) / 2, clipped


def explained_variance(values_T: Tensor, returns_T: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant one. 0 where the returns do not vary."""
    variance = returns_T.double().var(unbiased=False) if returns_T.numel() else torch.zeros(())
    if not float(variance) > 0:
        return 0.0
    return float(1 - (returns_T.double() - values_T.double()).var(unbiased=False) / variance)
