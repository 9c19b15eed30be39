"""Hidden states and output weights -> vocabulary statistics, in blocks of logits.

The (T, V) logits are computed in blocks of columns, in forward and again in backward. If they are small enough to be
kept in between (``keep_bytes``), this saves one of four matrix products. On a GPU the kernels of `triton_head` compute
the steps between the products. The blocks are columns, not tokens: each block's part of the weight gradient is then one
matrix product in the weight's own precision. Blocks of tokens would have to accumulate V x H numbers for every block,
under bfloat16 in a float32 copy of the output layer.

Pure: torch, and Triton beside a GPU. Shape legend: T tokens, H hidden size, V rows of the local output layer (a whole
vocabulary, or this rank's slice of one), B columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.vocab_statistics import (
    VocabShard,
    checked_shard,
    combine,
    local_sums,
    local_targets,
    merge,
    workspace_elements,
    write_gradient,
)
from megatron_ext.rl.types import TokenStats

_ALIGNMENT = 128  # columns; a good multiple for matrix units
# Default number of elements of a block. Matrix products are faster with more than the caches of a CPU hold.
_CPU_BLOCK_ELEMENTS = 2**22
_GPU_BLOCK_ELEMENTS = 2**26
_ADDS_IN_FLOAT32 = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)  # `torch.addmm(out_dtype=)`


def linear_vocab_statistics(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    shard: VocabShard | None = None,
    chunk_tokens: int = 0,
    keep_bytes: int = 0,
) -> TokenStats:
    """`vocab_statistics` of ``hidden @ weight.T``, differentiable through ``logp`` and ``entropy`` to both factors.

    Products are made in the precision of the factors, as an output layer would; statistics are accumulated in float32
    at least. Under tensor parallelism each rank gets the gradient of its own rows of the weight, whole, and its own
    *part* of the hidden states' gradient: the caller sums that over ranks. Double backward is not supported.

    Args:
        hidden_TH: (T, H), floating. T may be 0; both gradients are 0 then.
        weight_VH: (V, H), of the same dtype. Rows beyond ``shard.size`` are padding.
        targets_T: (T,) int64, global ids; see `vocab_statistics`.
        shard: this rank's slice; None if the weight is the whole vocabulary without padding.
        chunk_tokens: workspace, as the number of tokens whose logits would fill it; 0 chooses. Affects speed and
            memory only.
        keep_bytes: logits of at most so many bytes are kept from forward to backward. Affects speed and memory only.

    Returns:
        TokenStats as `vocab_statistics` does, float64 if the factors are, else float32.

    Raises:
        ValueError: for shapes, dtypes or a shard that do not fit together.
    """
    if hidden_TH.dim() != 2 or weight_VH.dim() != 2 or hidden_TH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden states of shape {tuple(hidden_TH.shape)} with a weight of shape {tuple(weight_VH.shape)}: "
            "pass (T, H) and (V, H)"
        )
    if targets_T.shape != hidden_TH.shape[:1] or targets_T.dtype != torch.int64:
        raise ValueError(
            f"targets {targets_T.dtype} of shape {tuple(targets_T.shape)} for {len(hidden_TH)} hidden states: "
            "pass int64 (T,)"
        )
    if not hidden_TH.is_floating_point() or hidden_TH.dtype != weight_VH.dtype:
        raise ValueError(f"hidden states {hidden_TH.dtype}, weight {weight_VH.dtype}: pass one floating dtype")
    shard = checked_shard(shard, weight_VH.shape[0], chunk_tokens)
    columns = block_columns(hidden_TH.shape[0], shard.size, chunk_tokens, hidden_TH.device)
    keep = hidden_TH.shape[0] * shard.size * hidden_TH.element_size() <= keep_bytes
    return TokenStats(*_LinearVocabStatistics.apply(hidden_TH, weight_VH, targets_T, shard, columns, keep))


def block_columns(tokens: int, size: int, chunk_tokens: int, device: torch.device) -> int:
    """Columns of a block: as many as fit the workspace, at least one, all of them if possible."""
    columns = max(1, block_elements(chunk_tokens, size, gpu=device.type != "cpu") // max(1, tokens))
    return size if columns >= size else max(columns - columns % _ALIGNMENT, min(columns, _ALIGNMENT))


def block_elements(chunk_tokens: int, size: int, *, gpu: bool) -> int:
    """Logits that a block may have; one column is always allowed."""
    return chunk_tokens * size or (_GPU_BLOCK_ELEMENTS if gpu else _CPU_BLOCK_ELEMENTS)


class _LinearVocabStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        shard: VocabShard,
        columns: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype, device = torch.promote_types(hidden_TH.dtype, torch.float32), hidden_TH.device
        max_T = torch.full(targets_T.shape, float("-inf"), dtype=dtype, device=device)
        sums_5T = torch.zeros(5, len(targets_T), dtype=dtype, device=device)
        target_T, owned_T = torch.zeros_like(max_T), torch.zeros_like(max_T)
        fused = _fused(hidden_TH)
        keep = keep and any(ctx.needs_input_grad[:2])
        ctx.logits = hidden_TH.new_empty(len(targets_T), shard.size) if keep else None
        for weight_BH, block in _blocks(weight_VH, shard, columns):
            first = block.start - shard.start
            room = ctx.logits[:, first : first + block.size] if keep else None
            logits_TB = torch.mm(hidden_TH, weight_BH.T, out=room)
            if fused is not None:
                fused.add_sums(logits_TB, targets_T, block.start, max_T, sums_5T, target_T, owned_T)
            else:
                max_T, sums_5T = merge(max_T, sums_5T, *local_sums(logits_TB, _rows(logits_TB)))
                for total_T, part_T in zip(
                    (target_T, owned_T), local_targets(logits_TB, targets_T, block, dtype), strict=True
                ):
                    total_T += part_T
            del logits_TB  # before the next block is made: there is never more than one
        stats, top_T, log_z_T = combine(max_T, sums_5T, target_T, owned_T, shard)

        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, top_T, log_z_T, stats[1])
        ctx.shard, ctx.columns = shard, columns
        ctx.mark_non_differentiable(*stats[2:])
        ctx.set_materialize_grads(False)
        return stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logp_T: Tensor | None, grad_entropy_T: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        if grad_logp_T is None and grad_entropy_T is None:
            return None, None, None, None, None, None
        hidden_TH, weight_VH, targets_T, top_T, log_z_T, entropy_T = ctx.saved_tensors
        if grad_logp_T is None:
            grad_logp_T = torch.zeros_like(log_z_T)
        # Without an entropy term its gradient is 0 everywhere. A check on a GPU would synchronise, and its memory-bound
        # kernel would gain nothing.
        if grad_entropy_T is not None and grad_entropy_T.device.type == "cpu" and not bool(grad_entropy_T.any()):
            grad_entropy_T = None
        incoming = (top_T, log_z_T, entropy_T, grad_logp_T, grad_entropy_T)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_weight_VH = torch.empty_like(weight_VH) if wants_weight else None
        if grad_weight_VH is not None:
            grad_weight_VH[ctx.shard.size :] = 0
        kept, ctx.logits = ctx.logits, None  # its gradient replaces it, so a second backward makes it again
        fused = _fused(hidden_TH)
        grad_hidden_TH = None
        if wants_hidden and kept is None:
            grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=log_z_T.dtype)
        for weight_BH, block in _blocks(weight_VH, ctx.shard, ctx.columns):
            first = block.start - ctx.shard.start
            rows = slice(first, first + block.size)
            grad_TB = hidden_TH @ weight_BH.T if kept is None else kept[:, rows]  # logits, until their gradient
            if fused is not None:
                fused.write_gradient(grad_TB, grad_TB, targets_T, block.start, incoming)
            else:
                write_gradient(grad_TB, grad_TB, targets_T, block, incoming, _rows(grad_TB))
            if grad_hidden_TH is not None:
                if grad_hidden_TH.dtype == grad_TB.dtype:
                    grad_hidden_TH.addmm_(grad_TB, weight_BH)
                elif grad_TB.is_cuda and _ADDS_IN_FLOAT32:
                    torch.addmm(grad_hidden_TH, grad_TB, weight_BH, out_dtype=grad_hidden_TH.dtype, out=grad_hidden_TH)
                else:
                    grad_hidden_TH += grad_TB @ weight_BH
            if grad_weight_VH is not None:
                torch.mm(grad_TB.T, hidden_TH, out=grad_weight_VH[rows])
            del grad_TB
        if wants_hidden and kept is not None:  # one product, which adds up in float32 inside
            grad_hidden_TH = kept @ weight_VH[: ctx.shard.size]
        return None if grad_hidden_TH is None else grad_hidden_TH.to(hidden_TH), grad_weight_VH, None, None, None, None


def _fused(tensor: Tensor) -> ModuleType | None:
    """The Triton kernels, where they run."""
    kernels = _triton_kernels()
    return kernels if kernels is not None and kernels.supports(tensor) else None


@cache
def _triton_kernels() -> ModuleType | None:
    if not torch.cuda.is_available():
        return None  # importing Triton takes a second
    try:
        from megatron_ext.kernels import triton_head
    except ImportError:
        return None
    return triton_head


def _blocks(weight_VH: Tensor, shard: VocabShard, columns: int) -> Iterator[tuple[Tensor, VocabShard]]:
    """Rows of the weight without padding, a block at a time, and the slice of the vocabulary that they are."""
    for first in range(0, shard.size, max(1, columns)):
        block = replace(shard, start=shard.start + first, size=min(columns, shard.size - first))
        yield weight_VH[first : first + block.size], block


def _rows(logits_TB: Tensor) -> int:
    """Rows of a block to look at together: what stays in the cache of a CPU."""
    return max(1, workspace_elements(logits_TB.device) // max(1, logits_TB.shape[1]))
