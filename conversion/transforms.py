"""Named transforms between Hugging Face tensors ("parts") and full (unsharded) Megatron tensors.

Pure torch. A transform moves values and never changes them, so a round trip is bit-identical in every dtype. Each also
works on a block of rows of the Megatron tensor, which is how large tensors are streamed. Layouts follow Megatron-Core:
`linear_qkv` holds, per KV head, that head's queries, its key and its value (megatron/core/transformer/attention.py,
"ng * (np/ng + 2) * hn"); a gated `linear_fc1` holds the gate rows above the up rows (megatron/core/transformer/mlp.py).

Throughout: `groups` is the number of KV heads, `rows` the first dimension of every part, and a block is a range
[start, stop) of rows of the Megatron tensor whose ends are multiples of `unit(groups, rows)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Transform:
    """How parts lie in a Megatron tensor."""

    unit: Callable[[int, Sequence[int]], int]  # (groups, rows) -> granularity of blocks, in rows
    locate: Callable[[int, int, int, Sequence[int]], list[Range]]  # (start, stop, groups, rows) -> row range per part
    merge: Callable[[Sequence[Tensor], int], Tensor]  # (slices of the parts, groups in the block) -> block
    split: Callable[[Tensor, int, Sequence[int]], list[Tensor]]  # (block, groups in it, rows per part) -> slices


def _locate_stacked(start: int, stop: int, groups: int, rows: Sequence[int]) -> list[Range]:
    ranges, top = [], 0
    for count in rows:
        low, high = max(start - top, 0), min(stop - top, count)
        ranges.append((low, max(low, high)))  # rows past the end are vocabulary padding and belong to no part
        top += count
    return ranges


def _merge_stacked(parts: Sequence[Tensor], groups: int) -> Tensor:
    present = [part for part in parts if part.shape[0]]
    return present[0] if len(present) == 1 else torch.cat(present)


def _split_stacked(block: Tensor, groups: int, rows: Sequence[int]) -> list[Tensor]:
    return list(torch.split(block[: sum(rows)], list(rows)))


def _qkv_unit(groups: int, rows: Sequence[int]) -> int:
    return sum(rows) // groups


def _locate_qkv(start: int, stop: int, groups: int, rows: Sequence[int]) -> list[Range]:
    unit = _qkv_unit(groups, rows)
    assert start % unit == 0 and stop % unit == 0, (start, stop, unit)
    return [(start // unit * (count // groups), stop // unit * (count // groups)) for count in rows]


def _merge_qkv(parts: Sequence[Tensor], groups: int) -> Tensor:
    grouped = [part.reshape(groups, part.shape[0] // groups, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(block: Tensor, groups: int, rows: Sequence[int]) -> list[Tensor]:
    grouped = block.reshape(groups, block.shape[0] // groups, *block.shape[1:])
    return [part.flatten(0, 1) for part in torch.split(grouped, [count // groups for count in rows], dim=1)]


_STACKED = Transform(lambda groups, rows: 1, _locate_stacked, _merge_stacked, _split_stacked)

TRANSFORMS: dict[str, Transform] = {
    "copy": _STACKED,
    "gate_up": _STACKED,
    "qkv": Transform(_qkv_unit, _locate_qkv, _merge_qkv, _split_qkv),
}
