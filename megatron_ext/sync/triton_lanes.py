"""The "lanes" hash of `base.WeightDigest` as one Triton kernel, which reads every byte once.

torch's own operations write products of eight bytes for every word of four and read them again, ten times the bytes of
the tensor. Sums of integers modulo 2^64 do not depend on their order, so both give the same bits.
On a CPU the kernel runs in Triton's interpreter (``TRITON_INTERPRET=1``); the tests use it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, BLOCK, WARPS = 4, 512, 8  # of a program: rows share the loaded constants


@triton.jit
def _lanes_kernel(  # type: ignore[no-untyped-def]
    words, weights, out, count, rows, WORDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.zeros((ROWS, BLOCK), tl.int64)
    second = tl.zeros((ROWS, BLOCK), tl.int64)
    for start in range(0, WORDS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place = row[:, None] * WORDS + column[None, :]
        word = tl.load(words + place, mask=place < count, other=0).to(tl.int64)
        first += word * tl.load(weights + column)[None, :]
        second += word * tl.load(weights + WORDS + column)[None, :]
    tl.store(out + 2 * row, tl.sum(first, axis=1), mask=row < rows)
    tl.store(out + 2 * row + 1, tl.sum(second, axis=1), mask=row < rows)


def lanes(words: Tensor, weights: Tensor) -> Tensor:
    """(rows, 2) int64: the sums of every W of ``words`` (count,), int32, times each row of ``weights`` (2, W), int64.

    The last row may be shorter.
    """
    width = weights.shape[1]
    rows = triton.cdiv(len(words), width)
    out = torch.empty(rows, 2, dtype=torch.int64, device=words.device)
    block = min(BLOCK, width)
    assert width % block == 0 and words.is_contiguous() and weights.is_contiguous()
    _lanes_kernel[(triton.cdiv(rows, ROWS),)](
        words, weights, out, len(words), rows, WORDS=width, ROWS=ROWS, BLOCK=block, num_warps=WARPS
    )
    return out
