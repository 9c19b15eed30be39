"""What all policy losses share: inputs are cleaned, the ratio is formed, and (value, F) becomes a loss.

A policy-gradient loss is characterised by its *gradient weight* F: d(-loss_t)/dtheta = F * A * grad logp. Each loss
in this package states its value and F in closed form; `Loss.__call__` turns them into a differentiable per-token loss
in one line. Nothing is differentiated through exp, clamp or min, so the backward pass cannot overflow, and the
textbook objective under autograd remains an independent oracle for the tests.

Notation: r = exp(logp - old_logp), A advantage, p = exp(logp), all detached; shapes (T,), logarithms in nats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ext.rl.types import LossInputs, LossOutputs


@dataclass(frozen=True, slots=True)
class Terms:
    """Closed forms of one loss, all of shape (T,), none with gradient.

    ``value`` is the per-token objective (to be maximised), ``weight`` is F, ``metrics`` are per-token quantities whose
    mean over the masked tokens is logged.
    """

    value: Tensor
    weight: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Loss(ABC):
    """Base of the losses. Subclasses are frozen dataclasses whose fields are the loss's parameters."""

    @abstractmethod
    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        """Value and gradient weight. ``x`` is detached, at least float32, and 0 where the mask is False."""

    def __call__(self, x: LossInputs) -> LossOutputs:
        """Per-token loss, shape (T,), 0 where the mask is False, in the dtype of ``x.logp`` (at least float32).

        Masked-out tokens may hold anything, NaN included; they get gradient 0.

        Raises:
            ValueError: a field's shape or the mask's dtype is wrong, or a field that this loss needs is missing.
        """
        _check_shapes(x)
        dtype = torch.promote_types(x.logp.dtype, torch.float32)
        logp = x.logp.to(dtype)
        fixed = LossInputs(
            logp=_clean(logp, x.mask, dtype),
            old_logp=_clean(x.old_logp, x.mask, dtype),
            advantages=_clean(x.advantages, x.mask, dtype),
            mask=x.mask,
            seq_ids=x.seq_ids,
            entropy=None if x.entropy is None else _clean(x.entropy, x.mask, dtype),
        )
        log_ratio = fixed.logp - fixed.old_logp
        cap = max_log_ratio(dtype)
        ratio = log_ratio.clamp(max=cap).exp()
        t = self.terms(fixed, ratio)
        surrogate = t.value + t.weight * fixed.advantages * (logp - logp.detach())
        loss = torch.where(x.mask, -surrogate, torch.zeros((), dtype=dtype, device=logp.device))
        none = torch.zeros_like(ratio)
        per_token = {
            "pg_clipfrac_low": none,
            "pg_clipfrac_high": none,
            "pg_clipfrac_dual": none,
            "ppo_kl": -log_ratio,
            "ratio_mean": ratio,
            "ratio_overflow": log_ratio > cap,
            **t.metrics,
        }
        return LossOutputs(loss, {name: masked_mean(v.to(dtype), x.mask) for name, v in per_token.items()})


def max_log_ratio(dtype: torch.dtype) -> float:
    """Largest log r whose ratio is used as is: half of log(largest finite number), 44.4 in float32, 354.9 in float64.

    Beyond it F would be infinite soon after (float32: log r = 88.7), so r is capped, at a bound whose *square* is still
    finite, as the gradient norm needs. This is not a clamp of the log-ratio under autograd: a capped token keeps its
    (enormous, finite) gradient. The metric ``ratio_overflow`` counts such tokens.
    """
    return 0.5 * math.log(torch.finfo(dtype).max)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of the mask, 0 for an empty mask; scalar."""
    return torch.where(mask, values, torch.zeros_like(values)).sum() / mask.sum().clamp(min=1)


def segment_sum(values: Tensor, seq_ids: Tensor) -> Tensor:
    """(T,): for every token the sum of ``values`` over its sequence. Sequences are whole in it, in any order."""
    _, index = torch.unique(seq_ids, return_inverse=True)
    totals = values.new_zeros(values.numel()).index_add(0, index, values)
    return totals[index]


def _clean(values: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Detached, cast, and 0 outside the mask: padding may hold NaN, and NaN * 0 is NaN."""
    values = values.detach().to(dtype)
    return torch.where(mask, values, torch.zeros_like(values))


def _check_shapes(x: LossInputs) -> None:
    shape = x.logp.shape
    if len(shape) != 1:
        raise ValueError(f"LossInputs.logp has shape {tuple(shape)}: flatten the tokens to shape (T,).")
    if x.mask.dtype != torch.bool:
        raise ValueError(f"LossInputs.mask has dtype {x.mask.dtype}: pass bool; weights belong to aggregation.")
    for name in ("old_logp", "advantages", "mask", "seq_ids", "entropy"):
        value = getattr(x, name)
        if value is not None and value.shape != shape:
            raise ValueError(f"LossInputs.{name} has shape {tuple(value.shape)}: it must equal logp's, {tuple(shape)}.")
