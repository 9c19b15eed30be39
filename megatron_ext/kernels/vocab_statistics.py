"""Logits -> (log p, H, sum p^2, sum p^2 log p) per token, chunked over tokens and sharded over the vocabulary.

Pure: torch only; the reductions over the shards of a vocabulary are injected (`VocabShard`).
Shape legend: T tokens, V columns of the local logits (a whole vocabulary, or this rank's slice of one).

Written with ``u = x - max(x) <= 0`` and ``Z = sum exp(u) >= 1``, so that the bounds hold by construction and nothing
cancels: ``logp = u_y - ln Z`` and ``H = ln Z + sum(exp(u) * -u) / Z`` is a sum of non-negative terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.rl.types import TokenStats

# exp() of this is exactly 0 in float32 and float64, so a clamp to it changes no probability; unlike -inf it can be
# multiplied by that 0.
_LOG_ZERO = -1e4

# Workspace of one chunk, in elements. A chunk that fits the last-level cache is faster on a CPU than a large one.
_CPU_CHUNK_ELEMENTS = 2**18
_GPU_CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True, slots=True)
class VocabShard:
    """This rank's slice of a vocabulary: global ids ``start .. start + size - 1`` are local columns ``0 .. size - 1``.

    Columns from ``size`` on are padding: they are ignored and get gradient 0. ``size`` may be 0. Both callables map a
    tensor to its element-wise reduction over all slices (in place or not) and are called a fixed number of times.
    """

    start: int
    size: int
    all_reduce_sum: Callable[[Tensor], Tensor]
    all_reduce_max: Callable[[Tensor], Tensor]


def vocab_statistics(
    logits_TV: Tensor, targets_T: Tensor, *, shard: VocabShard | None = None, chunk_tokens: int = 0
) -> TokenStats:
    """Four vocabulary statistics per token, differentiable through ``logp`` and ``entropy``.

    The backward pass recomputes the softmax chunk by chunk, so no [T, V] tensor besides the logits and their gradient
    is allocated in either direction. The input is not modified. Under tensor parallelism the incoming gradients of
    ``logp`` and ``entropy`` are the same on every rank, and each rank gets the gradient of its own columns without
    further communication. Double backward is not supported.

    Args:
        logits_TV: (T, V), any floating dtype; finite, or -inf for tokens that cannot occur.
        targets_T: (T,) int64, global ids. A target that no shard owns gives NaN (checking costs a device sync);
            a target whose logit is -inf gives ``logp = -inf``.
        shard: this rank's slice; None if ``logits_TV`` is the whole vocabulary without padding.
        chunk_tokens: tokens per chunk; 0 chooses. Affects speed and workspace only.

    Returns:
        TokenStats of shape (T,) in nats, float64 if the logits are, else float32. ``logp <= 0``,
        ``0 <= entropy <= ln V``. ``sum_p2`` and ``sum_p2_logp`` carry no gradient.

    Raises:
        ValueError: for shapes, dtypes or a shard that do not fit together.
    """
    if logits_TV.dim() != 2 or targets_T.shape != logits_TV.shape[:1]:
        raise ValueError(
            f"logits of shape {tuple(logits_TV.shape)} with targets of shape {tuple(targets_T.shape)}: "
            "pass logits (T, V) and targets (T,)"
        )
    if not logits_TV.is_floating_point() or targets_T.dtype != torch.int64:
        raise ValueError(f"logits {logits_TV.dtype} and targets {targets_T.dtype}: pass floating logits, int64 targets")
    shard = checked_shard(shard, logits_TV.shape[1], chunk_tokens)
    chunk_tokens = chunk_tokens or max(1, workspace_elements(logits_TV.device) // max(1, shard.size))
    return TokenStats(*_VocabStatistics.apply(logits_TV, targets_T, shard, chunk_tokens))


def checked_shard(shard: VocabShard | None, columns: int, chunk_tokens: int) -> VocabShard:
    """``shard``, or that of a whole vocabulary; ValueError when it does not fit, or the chunk is negative."""
    if shard is None:
        shard = VocabShard(0, columns, _identity, _identity)
    if not 0 <= shard.size <= columns:
        raise ValueError(f"shard.size={shard.size} does not fit logits with {columns} columns")
    if chunk_tokens < 0:
        raise ValueError(f"chunk_tokens={chunk_tokens}: use 0 (automatic) or a positive number of tokens")
    return shard


def workspace_elements(device: torch.device) -> int:
    """Default number of elements of a chunk."""
    return _CPU_CHUNK_ELEMENTS if device.type == "cpu" else _GPU_CHUNK_ELEMENTS


class _VocabStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, targets_T: Tensor, shard: VocabShard, chunk_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        max_T, sums_5T = local_sums(logits_TV[:, : shard.size], chunk_tokens)
        target_T, owned_T = local_targets(logits_TV, targets_T, shard, max_T.dtype)
        stats, top_T, log_z_T = combine(max_T, sums_5T, target_T, owned_T, shard)
        logp_T, entropy_T, sum_p2_T, sum_p2_logp_T = stats

        ctx.save_for_backward(logits_TV, targets_T, top_T, log_z_T, entropy_T)
        ctx.shard, ctx.chunk_tokens = shard, chunk_tokens
        ctx.mark_non_differentiable(sum_p2_T, sum_p2_logp_T)
        ctx.set_materialize_grads(False)
        return logp_T, entropy_T, sum_p2_T, sum_p2_logp_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logp_T: Tensor | None, grad_entropy_T: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        """d logp / dx_v = [v = y] - p_v and dH / dx_v = -p_v (H + log p_v)."""
        if grad_logp_T is None and grad_entropy_T is None:
            return None, None, None, None
        logits_TV, targets_T, top_T, log_z_T, entropy_T = ctx.saved_tensors
        if grad_logp_T is None:
            grad_logp_T = torch.zeros_like(log_z_T)
        grad_TV = torch.empty_like(logits_TV)
        grad_TV[:, ctx.shard.size :] = 0
        incoming = (top_T, log_z_T, entropy_T, grad_logp_T, grad_entropy_T)
        write_gradient(grad_TV, logits_TV, targets_T, ctx.shard, incoming, ctx.chunk_tokens)
        return grad_TV, None, None, None


def combine(
    max_T: Tensor, sums_5T: Tensor, target_T: Tensor, owned_T: Tensor, shard: VocabShard
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
    """The four statistics from the parts of all shards, and the maximum and log Z (T,) of the whole vocabulary.

    One maximum and one sum over the shards, whatever the number of chunks.
    """
    top_T = shard.all_reduce_max(max_T.clone())
    shift_T = (max_T - top_T).clamp(min=_LOG_ZERO)
    partial = torch.cat([_rescale(sums_5T, shift_T), torch.stack([target_T, owned_T])])
    z_T, zu_T, z2_T, z2u_T, size_T, target_T, owned_T = shard.all_reduce_sum(partial).unbind(0)

    log_z_T = z_T.log()
    logp_T = (target_T - top_T).clamp(max=0.0) - log_z_T
    logp_T = logp_T.masked_fill(owned_T == 0, float("nan"))
    entropy_T = torch.minimum(log_z_T - zu_T / z_T, _log_not_above(size_T))
    sum_p2_T = z2_T / z_T.square()
    sum_p2_logp_T = z2u_T / z_T.square() - log_z_T * sum_p2_T
    return (logp_T, entropy_T, sum_p2_T, sum_p2_logp_T), top_T, log_z_T


def write_gradient(
    grad_TV: Tensor,
    logits_TV: Tensor,
    targets_T: Tensor,
    shard: VocabShard,
    incoming: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    chunk_tokens: int,
) -> None:
    """The gradient of the logits into the first ``shard.size`` columns of ``grad_TV``, which may be the logits.

    ``incoming``: (T,) maximum, log Z, entropy, gradient of log p, and of the entropy (None: 0).
    """
    top_T, log_z_T, entropy_T, grad_logp_T, grad_entropy_T = incoming
    column_T, owned_T = _columns(targets_T, shard)
    size = shard.size
    for start in range(0, logits_TV.shape[0] if size else 0, chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logp_CV = _centred(logits_TV[rows, :size], top_T[rows]).sub_(log_z_T[rows, None])
        out_CV = logp_CV.exp()
        if grad_entropy_T is None:
            out_CV.mul_(grad_logp_T[rows, None])
        else:
            out_CV.mul_(
                logp_CV.add_(entropy_T[rows, None]).mul_(grad_entropy_T[rows, None]).add_(grad_logp_T[rows, None])
            )
        out_CV.neg_().scatter_add_(1, column_T[rows, None], (grad_logp_T[rows] * owned_T[rows])[:, None])
        grad_TV[rows, :size] = out_CV


def merge(max_T: Tensor, sums_5T: Tensor, other_max_T: Tensor, other_sums_5T: Tensor) -> tuple[Tensor, Tensor]:
    """`local_sums` of two sets of columns together."""
    top_T = torch.maximum(max_T, other_max_T)

    def shift(x_T: Tensor) -> Tensor:  # equal maxima may both be -inf
        return torch.where(x_T == top_T, 0.0, x_T - top_T).clamp(min=_LOG_ZERO)

    return top_T, _rescale(sums_5T, shift(max_T)) + _rescale(other_sums_5T, shift(other_max_T))


def local_sums(logits_TV: Tensor, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """Row maxima (T,) and, relative to them, (5, T) sums over the local columns: e, e u, e^2, e^2 u and 1."""
    tokens, columns = logits_TV.shape
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    max_T = torch.full((tokens,), float("-inf"), dtype=dtype, device=logits_TV.device)
    sums_5T = torch.zeros(5, tokens, dtype=dtype, device=logits_TV.device)
    if columns == 0:
        return max_T, sums_5T
    sums_5T[4] = columns
    for start in range(0, tokens, chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        chunk_CV = logits_TV[rows]
        max_T[rows] = chunk_CV.amax(dim=1)
        # A row that is -inf throughout this shard has no maximum to subtract; its sums are 0 anyway.
        u_CV = _centred(chunk_CV, max_T[rows].masked_fill(max_T[rows] == float("-inf"), 0.0))
        e_CV = u_CV.exp()
        sums_5T[0, rows] = e_CV.sum(dim=1)
        u_CV.mul_(e_CV)
        sums_5T[1, rows] = u_CV.sum(dim=1)
        sums_5T[3, rows] = u_CV.mul_(e_CV).sum(dim=1)
        sums_5T[2, rows] = e_CV.square_().sum(dim=1)
    return max_T, sums_5T


def _rescale(sums_5T: Tensor, shift_T: Tensor) -> Tensor:
    """The sums of `local_sums`, re-expressed relative to a maximum that lies ``-shift`` higher."""
    z, zu, z2, z2u, size = sums_5T.unbind(0)
    e = shift_T.exp()
    return torch.stack([e * z, e * (zu + shift_T * z), e * e * z2, e * e * (z2u + shift_T * z2), size])


def _centred(logits_CV: Tensor, max_C: Tensor) -> Tensor:
    """A fresh tensor ``logits - max`` in the accumulation dtype, with -inf replaced by a number whose exp is 0."""
    return torch.sub(logits_CV, max_C[:, None]).clamp_(min=_LOG_ZERO)


def _columns(targets_T: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Local column of each target (0 where another shard owns it) and whether this shard owns it."""
    local_T = targets_T - shard.start
    owned_T = (local_T >= 0) & (local_T < shard.size)
    return local_T.masked_fill(~owned_T, 0), owned_T


def local_targets(logits_TV: Tensor, targets_T: Tensor, shard: VocabShard, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logit of each target and 1.0, or 0.0 and 0.0 where another shard owns the target."""
    column_T, owned_T = _columns(targets_T, shard)
    if logits_TV.shape[1] == 0:
        return torch.zeros_like(targets_T, dtype=dtype), owned_T.to(dtype)
    picked_T = logits_TV.gather(1, column_T[:, None]).squeeze(1).to(dtype)
    return picked_T.masked_fill(~owned_T, 0.0), owned_T.to(dtype)


def _log_not_above(size_T: Tensor) -> Tensor:
    """ln(size) rounded towards 0, so that an entropy cut to it is <= ln V in exact arithmetic too."""
    exact_T = size_T.double().log()
    rounded_T = exact_T.to(size_T.dtype)
    return torch.where(rounded_T.double() > exact_T, rounded_T.nextafter(torch.zeros_like(rounded_T)), rounded_T)


def _identity(x: Tensor) -> Tensor:
    return x
