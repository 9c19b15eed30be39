"""KL penalty to a reference policy, per token. Off in every recipe. Source: Schulman 2020, "Approximating KL"."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.rl.params import check_choice


def kl_to_reference(name: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(pi || ref) at each sampled token, differentiable in ``logp``, shape (T,), nats.

    With d = logp - ref_logp: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. As *values* k1 and k3 are unbiased; as
    *losses* only k2 has the gradient of the KL in expectation under the policy (k1's is 0 in expectation).

    Raises:
        ValueError: unknown name.
    """
    check_choice("kl.name", name, ("k1", "k2", "k3"))
    d = logp - ref_logp.detach()
    if name == "k1":
        return d
    if name == "k2":
        return d.square() / 2
    return torch.exp(-d) - 1 + d
