"""Triton kernels of the head: one pass over a block of logits for its statistics, one for its gradient.

cuBLAS computes the matrix products. The steps between them are memory-bound, and the kernels here read each logit once.
torch's own operations need about ten passes and float32 copies of the block.

The last bits of the sums depend on the order of addition within a row. Their launch has one fixed shape, because a
statistics pass and an update, and two runs, must agree. The gradient is elementwise and does not depend on its launch
shape, which is therefore tuned on first use (`triton.autotune`).

On a CPU the kernels run in Triton's interpreter (``TRITON_INTERPRET=1``); the tests use it.
Shape legend: T tokens, B columns of a block.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG_ZERO = tl.constexpr(-1e4)  # see vocab_statistics
_SUM_BLOCK, _SUM_WARPS = 4096, 4
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _add_all(a, b, c, d, e, f, g, h):  # type: ignore[no-untyped-def]
    return a + e, b + f, c + g, d + h


@triton.jit
def _sums_kernel(  # type: ignore[no-untyped-def]
    logits, stride, columns, targets, start, tokens, top_T, sums_5T, target_T, owned_T, BLOCK: tl.constexpr
):
    """One row: carries maximum and sums over its columns, from what earlier blocks have left there."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    top = tl.load(top_T + row)
    z = tl.load(sums_5T + row)
    zu = tl.load(sums_5T + tokens + row)
    z2 = tl.load(sums_5T + 2 * tokens + row)
    z2u = tl.load(sums_5T + 3 * tokens + row)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(top.dtype)
        new = tl.maximum(top, tl.max(x, axis=0))
        base = tl.where(new == float("-inf"), 0.0, new)  # nothing finite yet: all sums are 0
        shift = tl.where(top == new, 0.0, tl.maximum(top - base, _LOG_ZERO))
        scale = tl.exp(shift)
        u = tl.maximum(x - base, _LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp(u)
        e2 = e * e
        # One reduction of four numbers waits for the other warps once, four reductions four times.
        new_z, new_zu, new_z2, new_z2u = tl.reduce((e, e * u, e2, e2 * u), 0, _add_all)
        zu = scale * (zu + shift * z) + new_zu
        z = scale * z + new_z
        z2u = scale * scale * (z2u + shift * z2) + new_z2u
        z2 = scale * scale * z2 + new_z2
        top = new
    tl.store(top_T + row, top)
    tl.store(sums_5T + row, z)
    tl.store(sums_5T + tokens + row, zu)
    tl.store(sums_5T + 2 * tokens + row, z2)
    tl.store(sums_5T + 3 * tokens + row, z2u)
    wanted = tl.load(targets + row) - start
    if (wanted >= 0) & (wanted < columns):
        tl.store(target_T + row, tl.load(logits + wanted).to(top.dtype))
        tl.store(owned_T + row, tl.full((), 1.0, top.dtype))


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    gradient,
    gradient_stride,
    columns,
    targets,
    start,
    top_T,
    log_z_T,
    entropy_T,
    grad_logp_T,
    grad_entropy_T,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d logp / dx_v = [v = y] - p_v and dH / dx_v = -p_v (H + log p_v), times what comes in."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    top = tl.load(top_T + row)
    x = tl.load(logits + row * logits_stride + column, mask=inside, other=float("-inf")).to(top.dtype)
    logp = tl.maximum(x - top, _LOG_ZERO, propagate_nan=tl.PropagateNan.ALL) - tl.load(log_z_T + row)
    of_logp = tl.load(grad_logp_T + row)
    weight = of_logp
    if ENTROPY:
        weight += tl.load(grad_entropy_T + row) * (tl.load(entropy_T + row) + logp)
    hit = column == tl.load(targets + row) - start
    out = tl.where(hit, of_logp, 0.0) - tl.exp(logp) * weight
    tl.store(gradient + row * gradient_stride + column, out.to(gradient.dtype.element_ty), mask=inside)


_tuned_gradient: Any = _gradient_kernel
if not INTERPRETED:
    _tuned_gradient = triton.autotune(
        [triton.Config({"BLOCK": block}, num_warps=warps) for block in (1024, 2048, 4096) for warps in (4, 8)],
        key=["ENTROPY"],
        restore_value=["gradient"],  # it may be the logits
    )(_gradient_kernel)


def add_sums(
    logits_TB: Tensor,
    targets_T: Tensor,
    start: int,
    top_T: Tensor,
    sums_5T: Tensor,
    target_T: Tensor,
    owned_T: Tensor,
) -> None:
    """Bring maximum, sums, target's logit and ownership up to date with a block; see `vocab_statistics.local_sums`.

    Args:
        logits_TB: (T, B), columns contiguous, any floating dtype.
        targets_T: (T,) int64, global ids. ``start``: that of the block's first column.
        top_T, sums_5T, target_T, owned_T: (T,), (5, T), (T,), (T,), contiguous, float32 or float64, written.
    """
    tokens, columns = logits_TB.shape
    sums_5T[4] += columns
    if tokens and columns:
        assert logits_TB.stride(1) == 1 and sums_5T.is_contiguous()
        block = min(_SUM_BLOCK, triton.next_power_of_2(columns))
        arguments = (logits_TB, logits_TB.stride(0), columns, targets_T, start, tokens)
        _sums_kernel[(tokens,)](*arguments, top_T, sums_5T, target_T, owned_T, BLOCK=block, num_warps=_SUM_WARPS)


def write_gradient(
    grad_TB: Tensor,
    logits_TB: Tensor,
    targets_T: Tensor,
    start: int,
    incoming: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    """The gradient of a block's logits into ``grad_TB``, which may be the logits; see `vocab_statistics`."""
    top_T, log_z_T, entropy_T, grad_logp_T, grad_entropy_T = (None if x is None else x.contiguous() for x in incoming)
    tokens, columns = logits_TB.shape
    if not tokens or not columns:
        return
    assert logits_TB.stride(1) == 1 and grad_TB.stride(1) == 1
    where = (logits_TB, logits_TB.stride(0), grad_TB, grad_TB.stride(0), columns, targets_T, start)
    of = (top_T, log_z_T, entropy_T, grad_logp_T, log_z_T if grad_entropy_T is None else grad_entropy_T)
    size = {"BLOCK": min(1024, triton.next_power_of_2(columns))} if INTERPRETED else {}
    _tuned_gradient[lambda meta: (triton.cdiv(columns, meta["BLOCK"]), tokens)](
        *where, *of, ENTROPY=grad_entropy_T is not None, **size
    )


def supports(tensor: Tensor) -> bool:
    """Whether the kernels run where a tensor is."""
    return tensor.is_cuda or (INTERPRETED and tensor.device == torch.device("cpu"))
