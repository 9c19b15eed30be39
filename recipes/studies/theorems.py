"""The papers' theorems about entropy, on a tabular softmax, as (direction of the logits, slope of H) pairs.

Pure: torch only. Shape legend: V actions of a tabular softmax with logits ``z_V``. Entropies in nats. Papers:
Flexible Entropy Control, CE-GPPO, Clip-Low/High, Entropy Dynamics (Clip_B / Clip_V); see docs/references.md.
`residual_order` checks a pair: about 2 if the claim is right (halving the step quarters the error), 1 if not.

Notation: ``S_v = p_v (H + log p_v)`` is the discriminant of Entropy Dynamics (Clip-Low/High calls it Q), ``S`` the
one of the token taken, ``D = S - E_p[S]``, and ``r = pi_theta / pi_old``. `megatron_ext.rl.diagnostics` has the same
for a batch of tokens.

Errors in the papers, and the reading used here:
* Clip-Low/High theorems 1 and 2 hold with p_k, q_k and E under ``a ~ pi_k``. The paper defines X_k and Y_k by actions
  from ``pi_old``; expectations under ``pi_old`` give wrong values, sometimes with the wrong sign. The factor 1/T is
  dropped: one state is one token.
* CE-GPPO eq. 7 needs advantages centred under pi; its eq. 23, E[pi A] = E[A], is false, and is not needed for eq. 7.
* Entropy Dynamics theorem 2: the proof's expression for delta p_i has a wrong sign; the theorem is right.
* Entropy Dynamics corollaries 2, 4 and 4.1 hold in expectation over the sampled tokens, not for a batch. With
  independent tokens the expectation of the population covariance over N tokens is (1 - 1/N) of the exact change.
* Flexible Entropy Control eq. 6 drops the baseline E_p[S] of eq. 5 and so has the wrong sign for about one in six
  sampled tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class FirstOrder(NamedTuple):
    """A claim: a step ``eta * direction`` of the logits changes the entropy by ``eta * slope + O(eta^2)``."""

    direction: Tensor  # (V,)
    slope: Tensor  # scalar


def entropy(z_V: Tensor) -> Tensor:
    """H of softmax(z) over the last dimension."""
    logp_V = z_V.log_softmax(-1)
    return -(logp_V.exp() * logp_V).sum(-1)


def discriminants(z_V: Tensor) -> Tensor:
    """``S_v = p_v (H + log p_v)`` of every action. Flexible Entropy Control eq. 4: the gradient of H with respect to
    the logits is -S."""
    logp_V = z_V.log_softmax(-1)
    return logp_V.exp() * (entropy(z_V)[..., None] + logp_V)


def centred_discriminants(z_V: Tensor) -> Tensor:
    """``D_v = S_v - E_p[S]``. Flexible Entropy Control eq. 5: <grad L, grad H> = -A D for the token taken. Entropy
    Dynamics cor. 1: E_p[D] = 0."""
    s_V = discriminants(z_V)
    return s_V - (z_V.softmax(-1) * s_V).sum(-1, keepdim=True)


def residual_order(z_V: Tensor, claim: FirstOrder, eta: float) -> Tensor:
    """log2 of (error of the claim at ``eta`` / error at ``eta / 2``), measured by taking both steps."""

    def error(step: float) -> Tensor:
        return (entropy(z_V + step * claim.direction) - entropy(z_V) - step * claim.slope).abs()

    return torch.log2(error(eta) / error(eta / 2))


def single_logit(z_V: Tensor, action: int) -> FirstOrder:
    """Entropy Dynamics theorem 1: raising one logit changes H by -S of that action."""
    return FirstOrder(_one_hot(z_V, action), -discriminants(z_V)[action])


def single_token(z_V: Tensor, action: int) -> FirstOrder:
    """Entropy Dynamics theorem 2 (and Flexible Entropy Control eq. 5): ascent on log p of one action changes H by -D;
    eta stands for alpha = eta r A."""
    return FirstOrder(_one_hot(z_V, action) - z_V.softmax(-1), -centred_discriminants(z_V)[action])


def expected_gradient(z_V: Tensor, advantages_V: Tensor) -> FirstOrder:
    """CE-GPPO eq. 7: the expected policy gradient changes H by -Cov_pi(log pi, pi A), if A is centred under pi."""
    p_V, logp_V = z_V.softmax(-1), z_V.log_softmax(-1)
    direction = p_V * (advantages_V - (p_V * advantages_V).sum())
    return FirstOrder(direction, -covariance(p_V, logp_V, p_V * advantages_V))


def clipped_gradient(
    z_V: Tensor, z_old_V: Tensor, *, eps_low: float, eps_high: float, mu_nu: float = 1.0
) -> FirstOrder:
    """Clip-Low/High theorem 1: random rewards and PPO clipping, policy gradient.

    ``mu_nu`` is P(A > 0) E[A | A > 0] of advantages independent of the action, symmetric about 0. All expectations
    under softmax(z); the clipped sets compare it with softmax(z_old).
    """
    p_V, q_V = z_V.softmax(-1), discriminants(z_V)
    low_V, high_V = clip_events(z_V, z_old_V, eps_low=eps_low, eps_high=eps_high)
    h_V = low_V - high_V
    direction = mu_nu * p_V * (h_V - (p_V * h_V).sum())
    gap_V = (p_V * q_V).sum() - q_V
    # p_k (E[Q] - E[Q|X]) = E[1_X (E[Q] - Q)]: well defined for an empty X too.
    return FirstOrder(direction, mu_nu * ((p_V * low_V * gap_V).sum() - (p_V * high_V * gap_V).sum()))


def clipped_natural_gradient(
    z_V: Tensor, z_old_V: Tensor, *, eps_low: float, eps_high: float, mu_nu: float = 1.0
) -> FirstOrder:
    """Clip-Low/High theorem 2: as theorem 1 for the natural policy gradient, whose update of the logits is ``eta mu nu
    h``."""
    p_V, logp_V = z_V.softmax(-1), z_V.log_softmax(-1)
    low_V, high_V = clip_events(z_V, z_old_V, eps_low=eps_low, eps_high=eps_high)
    surprise_V = -logp_V - entropy(z_V)
    slope = mu_nu * ((p_V * low_V * surprise_V).sum() - (p_V * high_V * surprise_V).sum())
    return FirstOrder(mu_nu * (low_V - high_V), slope)


def clip_events(z_V: Tensor, z_old_V: Tensor, *, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor]:
    """Indicators, in the dtype of ``z_V``, of Clip-Low/High's X (r < 1 - eps_low) and Y (r > 1 + eps_high)."""
    ratio_V = (z_V.log_softmax(-1) - z_old_V.log_softmax(-1)).exp()
    return (ratio_V < 1 - eps_low).to(z_V.dtype), (ratio_V > 1 + eps_high).to(z_V.dtype)


def covariance(p_V: Tensor, x_V: Tensor, y_V: Tensor) -> Tensor:
    """Cov of two functions of an action drawn from ``p_V``."""
    return (p_V * x_V * y_V).sum() - (p_V * x_V).sum() * (p_V * y_V).sum()


def expected_token_slope(z_V: Tensor, z_sample_V: Tensor, advantages_V: Tensor) -> Tensor:
    """Entropy Dynamics cor. 3 and 3.1: E over actions from softmax(z_sample) of a token's entropy slope, -Cov(A, r
    D)."""
    ratio_V = (z_V.log_softmax(-1) - z_sample_V.log_softmax(-1)).exp()
    return -covariance(z_sample_V.softmax(-1), advantages_V, ratio_V * centred_discriminants(z_V))


def batch_expectation(sampling_NV: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """Exact expectation of ``statistic(actions_N)`` over N independent actions, by enumerating all V^N batches.

    For Entropy Dynamics cor. 2, 4, 2.1 and 4.1, which hold in expectation only.
    """
    n, v = sampling_NV.shape
    total = torch.zeros((), dtype=sampling_NV.dtype)
    for actions in itertools.product(range(v), repeat=n):
        actions_N = torch.tensor(actions)
        total = total + sampling_NV[torch.arange(n), actions_N].prod() * statistic(actions_N)
    return total


def value_gradient_norm(z_V: Tensor, reward_V: Tensor) -> Tensor:
    """``||grad_z V||_2`` with V = E_pi[R]. Flexible Entropy Control section 2.2 states it is <= 2 H; with R in [0, 1]
    it is <= H even: ||grad V||_1 = E|R - V| <= E|R - R'| <= P(a != a') = 1 - sum p^2 <= -ln sum p^2 <= H."""
    p_V = z_V.softmax(-1)
    return (p_V * (reward_V - (p_V * reward_V).sum())).norm()


def _one_hot(z_V: Tensor, action: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(action), z_V.shape[-1]).to(z_V)
