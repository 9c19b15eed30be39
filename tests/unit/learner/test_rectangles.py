"""Ranges of flattened tensors as rectangles."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.rectangles import rectangles, split

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(SHAPES, st.data())
def test_rectangles_are_the_range_in_order(shape: list[int], data: st.DataObject) -> None:
    """In order they give exactly the elements of the range, and there are few; the same for parts of a range."""
    size = prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(0, size))
    numbers = torch.arange(size).view(shape)
    found = list(rectangles(shape, start, stop))
    most = data.draw(st.integers(1, 30))
    parts = [part for piece in found for part in split(piece, most)]
    assert all(prod(part.sizes) <= max(most, prod(shape[1:])) for part in parts)
    read = []
    for piece in parts:
        part = numbers[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))]
        assert part.shape == piece.sizes and int(part.flatten()[0]) == piece.start
        read += part.flatten().tolist()
    assert read == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1


def test_a_range_of_whole_rows_is_one_rectangle() -> None:
    (piece,) = rectangles((7, 3, 2), 6, 24)
    assert (piece.offsets, piece.sizes, piece.start) == ((1, 0, 0), (3, 3, 2), 6)
