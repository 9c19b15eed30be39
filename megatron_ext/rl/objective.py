"""The objective of an optimizer step over flat response tokens: a policy loss, what is added to it, and its gradient.

Pure: torch only. Shape (T,) throughout, logarithms in nats. The gradient with respect to the log-probabilities and the
entropies is that of the whole objective, so the diagnostics include selections, penalties and importance weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.rl.losses.kl import kl_to_reference
from megatron_ext.rl.types import LossInputs, LossOutputs

PolicyLoss = Callable[[LossInputs], LossOutputs]


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Per-token coefficients of the objective, (T,) each, constants."""

    weight: Tensor  # aggregation weight with its denominator, times the mismatch weight; 0 outside the mask is implied
    keep: Tensor  # bool: False where token selection switches the policy loss off
    kl_coef: Tensor  # of |logp - old_logp|
    entropy_coef: Tensor  # of -H
    ref_logp: Tensor | None = None  # log p under the reference policy; None: there is none
    ref_coef: float = 0.0  # of the KL to the reference
    ref_kl_type: str = "k3"  # see `kl_to_reference`
    nll_weight: Tensor | None = None  # of -logp, with its own denominator; None: off
    loss_weight: Tensor | None = None  # of the policy loss, from a selection that weighs tokens; None: 1


@dataclass(frozen=True, slots=True)
class Objective:
    """Result of `evaluate`."""

    total: Tensor  # scalar, differentiable; training minimises it
    policy: Tensor  # scalar, detached: the policy loss alone, aggregated
    outputs: LossOutputs  # of the policy loss, before selection and weights
    kl_ref: Tensor | None  # (T,) detached, KL estimate per token, 0 outside the mask; None without a reference
    ascent: Tensor  # (T,) detached, -d total / d logp; 0 if ``logp`` needs no gradient
    entropy_ascent: Tensor  # (T,) detached, -d total / d H; 0 if ``entropy`` needs no gradient


def evaluate(loss: PolicyLoss, x: LossInputs, c: Coefficients) -> Objective:
    """sum_t weight (keep loss_weight loss + kl_coef |log r| - entropy_coef H + ref_coef KL_ref) - nll_weight logp.

    Tokens outside the mask may hold anything in ``x``; they add nothing.

    Raises:
        ValueError: from the loss, or for an unknown ``ref_kl_type``.
    """
    assert x.entropy is not None, "the objective needs the entropies"
    out = loss(x)
    # NaN outside the mask would reach the gradient through abs.
    logp, old_logp, entropy = (torch.where(x.mask, v, 0.0) for v in (x.logp, x.old_logp, x.entropy))
    weight = torch.where(x.mask, c.weight.to(out.loss.dtype), 0.0)
    per_token = torch.where(c.keep, out.loss, 0.0)
    policy = (weight * (per_token if c.loss_weight is None else c.loss_weight * per_token)).sum()
    beside = c.kl_coef * (logp - old_logp).abs() - c.entropy_coef * entropy
    kl_ref = None
    if c.ref_logp is not None:
        kl_ref = torch.where(x.mask, kl_to_reference(c.ref_kl_type, logp, c.ref_logp), 0.0)
        beside = beside + c.ref_coef * kl_ref
    total = policy + (weight * torch.where(x.mask, beside, 0.0)).sum()
    if c.nll_weight is not None:
        total = total - torch.where(x.mask, c.nll_weight * logp, 0.0).sum()
    ascent, entropy_ascent = _ascent(total, x.logp, x.entropy)
    return Objective(total, policy.detach(), out, None if kl_ref is None else kl_ref.detach(), ascent, entropy_ascent)


def _ascent(total: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    leaves = [x for x in (logp, entropy) if x.requires_grad and total.requires_grad]
    slopes = torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True) if leaves else ()
    found = iter(slopes)
    return tuple(-next(found) if x.requires_grad and leaves else torch.zeros_like(x) for x in (logp, entropy))  # type: ignore[return-value]
