"""Base classes of the policy losses: they clean the inputs, form the ratio, and turn closed forms into a loss.

A policy-gradient loss is characterised by its *gradient weight* F: d(-loss_t)/dtheta = F * A * grad logp. A `Loss`
gives its value and F * A in closed form. The backward pass does not go through exp, clamp or min, so it cannot
overflow, and tests can compare with the textbook objective under autograd. A `DifferentiableLoss` gives only the
objective; autograd computes the gradient.

Notation: r = exp(logp - old_logp), A advantage, p = exp(logp), all detached; shapes (T,), logarithms in nats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from megatron_ext.rl.types import LossInputs, LossOutputs


class Actuator(NamedTuple):
    """A loss parameter that steers entropy."""

    sign: int  # +1: raising the parameter raises entropy, -1: it lowers it
    limits: tuple[float, float] | None = None  # default interval; None: moved only if the user gives one


@dataclass(frozen=True, slots=True)
class Terms:
    """Closed forms of one loss, all of shape (T,), none with gradient."""

    value: Tensor
    """The per-token objective, to be maximised."""
    gradient: Tensor
    """d value / d logp = F A."""
    below: Tensor | None = None
    """bool: the ratio is below the loss's lower bound. None: the loss has no such bound."""
    above: Tensor | None = None
    """bool: the ratio is above the loss's upper bound. None: the loss has no such bound."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Per-token quantities (bool or float) whose mean over the masked tokens is logged."""
    entropy_gradient: Tensor | None = None
    """d value / d H, for a loss that depends on the entropy. None: it does not."""


class Loss(ABC):
    """Base of the losses. Subclasses are frozen dataclasses whose fields are the loss's parameters."""

    runtime: ClassVar[tuple[str, ...]] = ()
    """Fields that `at` sets at every rollout step. They cannot be configured."""
    fits: ClassVar[bool] = False
    """Whether `fit` is called before every update, which costs a forward pass over the mini-batch."""
    actuators: ClassVar[Mapping[str, Actuator]] = {}
    """Parameters by which a closed loop can steer the entropy, see `megatron_ext.rl.schedules.EntropyTarget`."""

    @abstractmethod
    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        """Value and gradient. ``x`` is detached, at least float32, and 0 where the mask is False."""

    # A loss whose parameters follow the rollout step or the measured entropy overrides these three. The state is
    # JSON-serialisable and part of the checkpoint.

    def init_state(self) -> dict[str, Any]:
        """State before the first rollout step."""
        return {}

    def observe(self, state: Mapping[str, Any], *, step: int, total_steps: int, entropy: float) -> dict[str, Any]:
        """The state's new entries at rollout step ``step``, from the mean token entropy (nats) of its batch."""
        return {}

    def at(self, state: Mapping[str, Any], *, step: int, total_steps: int) -> dict[str, Any]:
        """Values of the `runtime` fields at this step."""
        return {}

    def fit(self, ratio: Tensor, advantages: Tensor) -> Loss:
        """The loss with parameters fitted to a mini-batch, given its response tokens, (T,) each."""
        return self

    def __call__(self, x: LossInputs) -> LossOutputs:
        """Per-token loss, shape (T,), 0 where the mask is False, in the dtype of ``x.logp`` (at least float32).

        Masked-out tokens may hold anything, NaN included; they get gradient 0.

        Raises:
            ValueError: a field's shape or the mask's dtype is wrong, or a field that this loss needs is missing.
        """
        _check_shapes(x)
        dtype = torch.promote_types(x.logp.dtype, torch.float32)
        logp = x.logp.to(dtype)
        # On a CPU this check is cheap; on a GPU it would synchronise.
        mask = None if x.mask.device.type == "cpu" and bool(x.mask.all()) else x.mask
        fixed = LossInputs(
            logp=_clean(logp, mask, dtype),
            old_logp=_clean(x.old_logp, mask, dtype),
            advantages=_clean(x.advantages, mask, dtype),
            mask=x.mask,
            seq_ids=x.seq_ids,
            entropy=None if x.entropy is None else _clean(x.entropy, mask, dtype),
            old_entropy=None if x.old_entropy is None else _clean(x.old_entropy, mask, dtype),
        )
        log_ratio = fixed.logp - fixed.old_logp
        cap = max_log_ratio(dtype)
        ratio = log_ratio.clamp(max=cap).exp_()
        t = self.terms(fixed, ratio)
        gradient = _clean(t.gradient, mask, dtype)
        loss: Tensor = _WithGradient.apply(logp, -_clean(t.value, mask, dtype), gradient)
        if t.entropy_gradient is not None and x.entropy is not None:
            loss = _WithGradient.apply(x.entropy.to(dtype), loss, _clean(t.entropy_gradient, mask, dtype))
        none = torch.zeros_like(x.mask)
        count = x.mask.sum().clamp(min=1)
        zero = torch.zeros((), dtype=dtype, device=logp.device)
        means = {
            **dict.fromkeys(("pg_clipfrac_low", "pg_clipfrac_high", "pg_clipfrac_dual"), zero),
            "ppo_kl": -_mean(log_ratio, mask, count, dtype),
            "ratio_mean": _mean(ratio, mask, count, dtype),
            "ratio_overflow": _mean(log_ratio > cap, mask, count, dtype),
        }
        return LossOutputs(
            loss=loss,
            gradient=gradient,
            below=none if t.below is None else _clean(t.below, mask, torch.bool),
            above=none if t.above is None else _clean(t.above, mask, torch.bool),
            metrics=means | {name: _mean(v, mask, count, dtype) for name, v in t.metrics.items()},
        )


class DifferentiableLoss(Loss):
    """A loss written as plain differentiable code: `objective` instead of `terms`; autograd gives the gradient.

    It costs one more backward pass through the objective than a closed form, and it is not protected from overflow.
    """

    @abstractmethod
    def objective(self, x: LossInputs) -> Tensor:
        """Per-token objective (T,), to be maximised. ``x.logp`` and ``x.entropy`` are differentiable."""

    def terms(self, x: LossInputs, ratio: Tensor) -> Terms:
        with torch.enable_grad():
            leaves = [x.logp.detach().requires_grad_()]
            if x.entropy is not None:
                leaves.append(x.entropy.detach().requires_grad_())
            value = self.objective(replace(x, logp=leaves[0], entropy=leaves[1] if len(leaves) > 1 else None))
            slopes = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
        return Terms(value.detach(), slopes[0], entropy_gradient=slopes[1] if len(slopes) > 1 else None)


class _WithGradient(torch.autograd.Function):
    """``value`` with -``slope`` added to its derivative with respect to ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope,) = ctx.saved_tensors
        return -(grads[0] * slope), grads[0], None


def max_log_ratio(dtype: torch.dtype) -> float:
    """Largest log r that is not capped: half of log(largest finite number), 44.4 in float32, 354.9 in float64.

    F becomes infinite at log r = 88.7 (float32). The cap is lower because the gradient norm needs the *square* to be
    finite. It is not a clamp of the log-ratio under autograd: a capped token keeps its large, finite gradient. The
    metric ``ratio_overflow`` counts such tokens."""
    return 0.5 * math.log(torch.finfo(dtype).max)


def needed(value: Tensor | None, field_name: str, why: str) -> Tensor:
    """``value``, an optional field of `LossInputs`. Raises ``ValueError`` if it is missing."""
    if value is None:
        raise ValueError(f"LossInputs.{field_name} is None: {why}.")
    return value


class Segments:
    """Sums over sequences, (S,), and back to their tokens, (T,). Sequences are whole in ``seq_ids``, in any order."""

    def __init__(self, seq_ids: Tensor) -> None:
        runs, counts = torch.unique_consecutive(seq_ids, return_counts=True)
        self._total = seq_ids.numel()
        self._counts: Tensor | None = counts
        self._index = seq_ids
        self._segments = runs.numel()
        ids, index = torch.unique(runs, return_inverse=True)
        if ids.numel() < runs.numel():  # the tokens of a sequence are in several places
            self._counts = None
            self._index = index.repeat_interleave(counts, output_size=self._total)
            self._segments = ids.numel()

    def sum(self, values: Tensor) -> Tensor:
        """(S,) sums of ``values`` (T,)."""
        if self._counts is not None:  # five times as fast on a CPU
            return torch.segment_reduce(values, "sum", lengths=self._counts, unsafe=True)
        return values.new_zeros(self._segments).index_add_(0, self._index, values)

    def spread(self, per_segment: Tensor) -> Tensor:
        """(T,): for every token the value of its sequence."""
        if self._counts is not None:
            return per_segment.repeat_interleave(self._counts, output_size=self._total)
        return per_segment.index_select(0, self._index)


def _mean(values: Tensor, mask: Tensor | None, count: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean over the ``count`` tokens of the mask (None: all), 0 for an empty one; scalar."""
    if values.dtype == torch.bool:
        return torch.count_nonzero(values if mask is None else values & mask).to(dtype) / count
    return _clean(values, mask, dtype).sum() / count


def _clean(values: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Detached, cast, and 0 outside the mask (None: all): padding may hold NaN, and NaN * 0 is NaN."""
    values = values.detach().to(dtype)
    return values if mask is None else torch.where(mask, values, torch.zeros_like(values))


def _check_shapes(x: LossInputs) -> None:
    shape = x.logp.shape
    if len(shape) != 1:
        raise ValueError(f"LossInputs.logp has shape {tuple(shape)}: flatten the tokens to shape (T,).")
    if x.mask.dtype != torch.bool:
        raise ValueError(f"LossInputs.mask has dtype {x.mask.dtype}: pass bool; weights belong to aggregation.")
    for name in ("old_logp", "advantages", "mask", "seq_ids", "entropy", "old_entropy"):
        value = getattr(x, name)
        if value is not None and value.shape != shape:
            raise ValueError(f"LossInputs.{name} has shape {tuple(value.shape)}: it must equal logp's, {tuple(shape)}.")
