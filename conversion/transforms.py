"""Named transforms between Hugging Face tensors and full (unsharded) Megatron tensors.

Pure torch. Each transform is a pair of inverse functions that move values and never change them, so a round trip is
bit-identical in every dtype. Layouts follow Megatron-Core: `linear_qkv` holds, per KV head, that head's queries, its
key and its value (megatron/core/transformer/attention.py, "ng * (np/ng + 2) * hn"); a gated `linear_fc1` holds the
gate rows above the up rows (megatron/core/transformer/mlp.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Transform:
    """`merge(parts, groups)` gives the Megatron tensor; `split(full, groups, rows)` gives the parts back.

    `groups` is the number of KV heads, `rows` the first dimension of every part.
    """

    merge: Callable[[Sequence[Tensor], int], Tensor]
    split: Callable[[Tensor, int, Sequence[int]], list[Tensor]]


def _merge_copy(parts: Sequence[Tensor], groups: int) -> Tensor:
    return parts[0]


def _split_copy(full: Tensor, groups: int, rows: Sequence[int]) -> list[Tensor]:
    # More rows than the Hugging Face tensor has can only be vocabulary padding: dropped here, in one place.
    return [full[: rows[0]]]


def _merge_stack(parts: Sequence[Tensor], groups: int) -> Tensor:
    return torch.cat(list(parts))


def _split_stack(full: Tensor, groups: int, rows: Sequence[int]) -> list[Tensor]:
    return list(torch.split(full, list(rows)))


def _merge_qkv(parts: Sequence[Tensor], groups: int) -> Tensor:
    grouped = [part.reshape(groups, part.shape[0] // groups, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(full: Tensor, groups: int, rows: Sequence[int]) -> list[Tensor]:
    grouped = full.reshape(groups, full.shape[0] // groups, *full.shape[1:])
    return [part.flatten(0, 1) for part in torch.split(grouped, [r // groups for r in rows], dim=1)]


TRANSFORMS: dict[str, Transform] = {
    "copy": Transform(_merge_copy, _split_copy),
    "gate_up": Transform(_merge_stack, _split_stack),
    "qkv": Transform(_merge_qkv, _split_qkv),
}
