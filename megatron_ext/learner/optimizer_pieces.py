"""The state of Megatron's distributed optimizer as rectangles of the parameters, without gathering it.

Megatron's ``fully_reshardable`` format stores moments and master weights in the shape of the parameters, so that any
layout reads them. To write it, Megatron-Core 0.16-0.19 gathers the whole state on every data-parallel rank (or on one):
12 bytes a parameter in host memory for each. But a data-parallel rank owns a contiguous range of each flattened
parameter, and such a range consists of at most ``2 n - 1`` rectangles of an n-dimensional tensor: a partial row, whole
rows, a partial row. torch's checkpoint format stores rectangles of any size. So every rank writes and reads views of
its own state, without gathering or allocating anything. Names and global shapes are Megatron's, so Megatron reads these
files as its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from megatron_ext.rectangles import Rectangle, rectangles, split

MOST_ELEMENTS = 2**26  # of a piece: one at a time passes through host memory


def use_pieces(optimizer: Any) -> None:
    """Make each distributed part of a Megatron optimizer save and load its state in pieces.

    Loading fills the state in place, so it must have been allocated before.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(part, "gbuf_ranges"):
            part.sharded_param_state_fully_reshardable = partial(state_pieces, part)
            part.load_parameter_state_from_fully_reshardable = _already_in_place


def _already_in_place(_: Any) -> None: ...


def state_pieces(
    part: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, dict[int, ShardedTensor]]]:
    """Master weights and moments of every parameter of which this rank has a range, as views of the state.

    The arguments are those of ``DistributedOptimizer.sharded_param_state_fully_reshardable``.
    """
    stored, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    of_parameter = {base.data: base for base in nested_values(stored)}
    state: dict[int, dict[str, dict[int, ShardedTensor]]] = {}
    for bucket in _buckets(part):
        for parameter, ranges in bucket["param_map"].items():
            tensors = part._get_main_param_and_optimizer_states(parameter)
            start, stop = ranges["param"].start, ranges["param"].end
            pieces = [
                (tensor, rectangle)
                for tensor in _stored_tensors(of_parameter[parameter])
                for rectangle in _within(tensor, start, stop)
            ]
            state[len(state)] = {
                name: {i: _piece(name, value, start, *piece) for i, piece in enumerate(pieces)}
                for name, value in tensors.items()
                if name != "step"  # a scalar; it is saved with the parameter groups
            }
    return state


def _buckets(part: Any) -> Iterator[Any]:
    for by_dtype in part.gbuf_ranges:
        for buckets in by_dtype.values():
            yield from buckets


def _stored_tensors(base: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The stored tensors of a parameter: itself, or parts such as gate and up, each a contiguous view of it."""
    shape, dtype = base.data.shape, base.data.dtype
    blank = replace(base, data=torch.empty(shape, dtype=dtype, device="meta"))
    built = blank.build() if isinstance(blank, ShardedTensorFactory) else blank
    tensors = [built] if isinstance(built, ShardedTensor) else list(nested_values(built))
    assert all(t.data.is_contiguous() for t in tensors) and sum(t.data.numel() for t in tensors) == prod(shape), base
    return tensors


def _within(tensor: ShardedTensor, start: int, stop: int) -> Iterator[Rectangle]:
    """The elements of ``start .. stop - 1`` of a parameter that belong to one of its stored tensors.

    Offsets are within that tensor, `Rectangle.start` counts from the parameter's first element.
    """
    before = tensor.data.storage_offset()
    low, high = max(start - before, 0), min(stop - before, tensor.data.numel())
    for rectangle in rectangles(tensor.data.shape, low, high):
        for part in split(rectangle, MOST_ELEMENTS):
            yield replace(part, start=part.start + before)


def _piece(name: str, values: torch.Tensor, start: int, tensor: ShardedTensor, rectangle: Rectangle) -> ShardedTensor:
    """``values``: this rank's range of the parameter, from its element ``start`` on, flat."""
    lead = tensor.prepend_axis_num
    sizes = (1,) * lead + rectangle.sizes
    first = rectangle.start - start
    offsets = tuple(a + b for a, b in zip(tensor.global_offset, (0,) * lead + rectangle.offsets, strict=True))
    return ShardedTensor(
        key=f"optimizer.state.{name}.{tensor.key}",
        data=values.detach().view(-1)[first : first + prod(sizes)].view(sizes),
        dtype=values.dtype,
        local_shape=sizes,
        global_shape=tensor.global_shape,
        global_offset=offsets,
        axis_fragmentations=None,  # of no regular grid
        replica_id=(*tensor.replica_id[:2], 0),  # no other data-parallel rank has these elements
        allow_shape_mismatch=tensor.allow_shape_mismatch,  # a padded vocabulary
    )
