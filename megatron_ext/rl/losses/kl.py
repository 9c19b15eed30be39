"""KL penalty to a reference policy, per token. Off in every recipe.

The estimators are Schulman's (2020, "Approximating KL divergence"). The gradient is given in closed form, as for the
policy losses: the derivative of k1 itself has mean 0 and would penalise nothing.
"""

from __future__ import annotations

from torch import Tensor

from megatron_ext.rl.losses.base import max_log_ratio
from megatron_ext.rl.params import check_choice

KL_TYPES = ("k1", "k2", "k3")


def kl_to_reference(name: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(pi || ref) at each sampled token, differentiable in ``logp``, shape (T,), nats.

    With d = logp - ref_logp, and F the weight of grad logp:

    ====  ================  ============  ===========================================================================
    name  value             F             in expectation under the policy
    ====  ================  ============  ===========================================================================
    k1    d                 d             unbiased value; gradient of KL(pi || ref), as if -d were added to the reward
    k2    d^2 / 2           d             biased value; the same gradient, which is the value's own
    k3    exp(-d) - 1 + d   1 - exp(-d)   unbiased value, never negative; gradient of KL(ref || pi), the value's own
    ====  ================  ============  ===========================================================================

    Tokens come from the policy before the update; like the public codes this has no importance ratio.

    Raises:
        ValueError: unknown name.
    """
    check_choice("reference.kl_type", name, KL_TYPES)
    d = logp.detach() - ref_logp.detach()
    # Only a token that the reference finds far likelier gets here: capped, so that its gradient is finite, not 0.
    ratio = (-d).clamp(max=max_log_ratio(d.dtype)).exp()
    value = {"k1": d, "k2": d.square() / 2, "k3": ratio - 1 + d}[name]
    weight = 1 - ratio if name == "k3" else d
    return value + weight * (logp - logp.detach())
