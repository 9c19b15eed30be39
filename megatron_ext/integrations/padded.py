"""Conversion between the padded (B, L) tensors of other trainers and the flat (T,) ones of `megatron_ext.rl`, T = B L.

B responses, one a row, of at most L tokens; every row is a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_ext.rl.selection import Selection, SelectionInputs, SelectionOutputs
from megatron_ext.rl.types import LossInputs, TokenStats


def loss_inputs(
    logp_BL: Tensor, old_logp_BL: Tensor, advantages: Tensor, mask_BL: Tensor, entropy_BL: Tensor | None = None
) -> LossInputs:
    """The inputs of a loss; ``advantages`` is (B, L), (B, 1) or (B,). Values outside the mask may be anything."""
    return LossInputs(
        logp=logp_BL.reshape(-1),
        old_logp=old_logp_BL.reshape(-1),
        advantages=per_token(advantages, logp_BL).reshape(-1),
        mask=mask_BL.bool().reshape(-1),
        seq_ids=row_ids(logp_BL).reshape(-1),
        entropy=None if entropy_BL is None else entropy_BL.reshape(-1),
    )


def select(
    selection: Selection,
    *,
    logp_BL: Tensor,
    entropy_BL: Tensor | None,
    advantages: Tensor,
    mask_BL: Tensor,
    seed: int,
    step: int,
    first_row: int = 0,
    **kwargs: Any,
) -> SelectionOutputs:
    """Token selection over a whole batch before its first update: (T,) tensors, to be viewed as (B, L).

    Trainers give log-probabilities and sometimes entropies, but not the sums over the vocabulary that ``clip_v`` needs.

    Args:
        logp_BL: under the current weights, which sampled the batch.
        entropy_BL: None if the trainer has none; only clip_cov, kl_cov and selections by advantage work then.
        first_row: number of responses on lower ranks: random picks and ties go by the response's index in the batch.
        kwargs: ``reduce``, for a batch that is spread over ranks.
    Raises:
        ValueError: the selection needs a statistic that is missing or not finite.
    """
    missing = selection.needs() - ({"logp"} if entropy_BL is None else {"logp", "entropy"})
    if missing:
        raise ValueError(
            f"{type(selection).__name__} needs {', '.join(sorted(missing))}, which this trainer does not provide."
        )
    unused = torch.zeros_like(logp_BL).reshape(-1)
    x = SelectionInputs(
        stats=TokenStats(
            logp=logp_BL.detach().reshape(-1),
            entropy=unused if entropy_BL is None else entropy_BL.detach().reshape(-1),
            sum_p2=unused,
            sum_p2_logp=unused,
        ),
        advantages=per_token(advantages, logp_BL).reshape(-1),
        mask=mask_BL.bool().reshape(-1),
        seq_ids=(row_ids(logp_BL) + first_row).reshape(-1),
        positions=torch.arange(logp_BL.shape[1], device=logp_BL.device).expand(logp_BL.shape).reshape(-1),
        seed=seed,
        step=step,
    )
    return selection.select(x, **kwargs)


def per_token(values: Tensor, like_BL: Tensor) -> Tensor:
    """(B,), (B, 1) or (B, L) values as (B, L)."""
    return (values.unsqueeze(1) if values.ndim == 1 else values).expand(like_BL.shape)


def row_ids(like_BL: Tensor) -> Tensor:
    """(B, L) int64: the row of each token."""
    return torch.arange(like_BL.shape[0], device=like_BL.device).unsqueeze(1).expand(like_BL.shape)


def metric_values(metrics: Mapping[str, Tensor], prefix: str = "actor/") -> dict[str, float]:
    """Metrics as numbers, under the names that our own trainer logs."""
    return {f"{prefix}{name}": float(value) for name, value in metrics.items()}
