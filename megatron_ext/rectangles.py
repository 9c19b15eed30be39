"""A contiguous range of a row-major tensor as rectangles. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Part of a row-major tensor that is contiguous in memory."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int  # of its first element among all elements


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[Rectangle]:
    """The elements ``start .. stop - 1`` of a row-major tensor, in order, as few rectangles."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield Rectangle((start,), (stop - start,), start)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows are first .. last - 1
    if first > last:  # all within one row
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        rest = tuple(shape[1:])
        yield Rectangle((first, *(0 for _ in rest)), (last - first, *rest), first * row)
    yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Rectangle]:
    before = index * prod(shape[1:])
    for inner in rectangles(shape[1:], start - before, stop - before):
        yield Rectangle((index, *inner.offsets), (1, *inner.sizes), before + inner.start)


def split(rectangle: Rectangle, most: int) -> Iterator[Rectangle]:
    """The rectangle in parts of about ``most`` elements or fewer, but never less than one index of its longest part.

    It is cut along its first axis that has more than one index, so that every part is contiguous too.
    """
    size = prod(rectangle.sizes)
    axis = next((i for i, n in enumerate(rectangle.sizes) if n > 1), None)
    if size <= most or axis is None:
        yield rectangle
        return
    inner = size // rectangle.sizes[axis]
    step = max(1, most // inner)
    for first in range(0, rectangle.sizes[axis], step):
        offsets, sizes = list(rectangle.offsets), list(rectangle.sizes)
        offsets[axis] += first
        sizes[axis] = min(step, rectangle.sizes[axis] - first)
        yield Rectangle(tuple(offsets), tuple(sizes), rectangle.start + first * inner)
