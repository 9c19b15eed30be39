"""The theorems of the papers, checked by taking the step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recipes.studies import theorems as theory

ETA = 1e-3


def logits(seed: int, *shape: int, scale: float = 1.5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def close(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def holds(z: Tensor, claim: theory.FirstOrder) -> bool:
    """Halving the step quarters the error: 2 up to the third-order term."""
    return abs(theory.residual_order(z, claim, ETA).item() - 2) < 0.1


def test_entropy_gradient_is_minus_the_discriminant() -> None:
    """P0 eq. 4, by autograd."""
    z = logits(0, 7).requires_grad_()
    (grad,) = torch.autograd.grad(theory.entropy(z), z)
    close(-theory.discriminants(z.detach()), grad)


def test_gradient_alignment() -> None:
    """P0 eq. 5: <grad A log p_a, grad H> = -A D_a, both gradients by autograd."""
    z = logits(1, 7).requires_grad_()
    (grad_h,) = torch.autograd.grad(theory.entropy(z), z)
    for action in range(7):
        (grad_l,) = torch.autograd.grad(-0.7 * z.log_softmax(-1)[action], z)
        close(grad_l @ grad_h, 0.7 * theory.centred_discriminants(z.detach())[action])


def test_the_sign_rule_without_baseline_is_often_wrong() -> None:
    """P0 eq. 6 drops E_p[S]: right for most, wrong for about one in six tokens sampled from a random softmax."""
    z = logits(2, 2000, 30)
    exact, rule = -theory.centred_discriminants(z), -(z.log_softmax(-1) + theory.entropy(z)[:, None])
    wrong = (z.softmax(-1) * (exact.sign() != rule.sign())).sum(-1).mean().item()
    assert 0.12 < wrong < 0.21


@pytest.mark.parametrize("action", range(5))
@pytest.mark.parametrize("seed", range(3))
def test_single_logit_and_single_token_steps(seed: int, action: int) -> None:
    """P4 theorems 1 and 2; each one's slope fails for the other's step."""
    z = logits(seed, 5)
    logit, token = theory.single_logit(z, action), theory.single_token(z, action)
    assert holds(z, logit) and holds(z, token)
    assert not holds(z, theory.FirstOrder(logit.direction, token.slope))
    assert not holds(z, theory.FirstOrder(token.direction, logit.slope))


def test_single_token_step_is_the_gradient_of_the_surrogate() -> None:
    """P4 eq. 7-9: r A log p_k, r held fixed; and P0 eq. 10."""
    z = logits(3, 6).requires_grad_()
    (grad,) = torch.autograd.grad(z.log_softmax(-1)[4], z)
    close(theory.single_token(z.detach(), 4).direction, grad)


@pytest.mark.parametrize("seed", range(4))
def test_covariance_formula_needs_centred_advantages(seed: int) -> None:
    """P2 eq. 7, with the direction by autograd; shifting A changes its slope but not the step."""
    z, advantages = logits(seed, 6).requires_grad_(), logits(seed + 100, 6)
    (grad,) = torch.autograd.grad((z.softmax(-1) * advantages).sum(), z)
    z = z.detach()
    centred = advantages - (z.softmax(-1) * advantages).sum()
    claim = theory.expected_gradient(z, centred)
    close(claim.direction, grad)
    assert holds(z, claim)
    shifted = theory.expected_gradient(z, centred + 1.0)
    close(shifted.direction, grad)
    assert not holds(z, shifted)


def surrogate_gradient(z: Tensor, z_old: Tensor, eps_low: float, eps_high: float, wrt: str) -> Tensor:
    """Gradient of E[min(r A, clip(r) A)] over a ~ pi_old and A = +-1 with probability 1/4 each (else 0), by autograd
    with respect to the logits or the probabilities; mu nu = 1/4."""
    p_old = z_old.softmax(-1)
    leaf = (z.clone() if wrt == "logits" else z.softmax(-1)).requires_grad_()
    ratio = (leaf.softmax(-1) if wrt == "logits" else leaf) / p_old
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    objective = sum(0.25 * (p_old * torch.minimum(ratio * a, clipped * a)).sum() for a in (1.0, -1.0))
    assert isinstance(objective, Tensor)
    return torch.autograd.grad(objective, leaf)[0]


@pytest.mark.parametrize(("eps_low", "eps_high"), [(0.2, 0.2), (0.05, math.inf), (1.0, 0.1)])
@pytest.mark.parametrize("seed", range(3))
def test_clipping_bias_of_the_policy_gradient(seed: int, eps_low: float, eps_high: float) -> None:
    """P3 theorem 1, its step being the autograd gradient of the clipped objective; clip-high or clip-low off too."""
    z, z_old = logits(seed, 8), logits(seed, 8) + logits(seed + 50, 8, scale=0.6)
    claim = theory.clipped_gradient(z, z_old, eps_low=eps_low, eps_high=eps_high, mu_nu=0.25)
    close(claim.direction, surrogate_gradient(z, z_old, eps_low, eps_high, "logits"))
    assert claim.direction.abs().max() > 0
    assert holds(z, claim)


@pytest.mark.parametrize("seed", range(3))
def test_clipping_bias_of_the_natural_policy_gradient(seed: int) -> None:
    """P3 theorem 2: pi' ~ pi exp(eta grad_pi J)."""
    z, z_old = logits(seed, 8), logits(seed, 8) + logits(seed + 50, 8, scale=0.6)
    claim = theory.clipped_natural_gradient(z, z_old, eps_low=0.2, eps_high=0.2, mu_nu=0.25)
    close(claim.direction, surrogate_gradient(z, z_old, 0.2, 0.2, "probabilities"))
    assert claim.direction.abs().max() > 0
    assert holds(z, claim)


def test_clipping_bias_is_not_the_one_under_the_old_policy() -> None:
    """P3 theorem 1 with p_k, q_k and E under pi_old fails, and for some policies has the wrong sign."""
    wrong_sign = 0
    for seed in range(40):
        z, z_old = logits(seed, 8), logits(seed, 8) + logits(seed + 50, 8, scale=0.6)
        low, high = theory.clip_events(z, z_old, eps_low=0.2, eps_high=0.2)
        p_old, q = z_old.softmax(-1), theory.discriminants(z)
        gap = (p_old * q).sum() - q
        slope = (p_old * low * gap).sum() - (p_old * high * gap).sum()
        claim = theory.clipped_gradient(z, z_old, eps_low=0.2, eps_high=0.2)
        assert not holds(z, theory.FirstOrder(claim.direction, slope))
        wrong_sign += int(slope.sign() != claim.slope.sign())
    assert wrong_sign > 0


def test_entropy_change_factors_average_to_zero_over_actions() -> None:
    """P4 cor. 1 and 1.1, exactly."""
    z, z_sample = logits(5, 9), logits(6, 9)
    factor = theory.centred_discriminants(z)
    ratio = (z.log_softmax(-1) - z_sample.log_softmax(-1)).exp()
    close((z.softmax(-1) * factor).sum(), 0.0)
    close((z_sample.softmax(-1) * ratio * factor).sum(), 0.0)
    assert factor.abs().max() > 1e-2


@pytest.mark.parametrize("off_policy", [False, True])
def test_expected_token_change_is_the_covariance(off_policy: bool) -> None:
    """P4 cor. 3 and 3.1: every action's own step is taken and measured, then averaged over the sampling policy."""
    z, advantages = logits(7, 6), logits(8, 6)
    z_sample = logits(9, 6) if off_policy else z
    slope = theory.expected_token_slope(z, z_sample, advantages)
    p_sample = z_sample.softmax(-1)
    ratio = z.softmax(-1) / p_sample

    def error(eta: float) -> Tensor:
        steps = torch.stack([theory.single_token(z, k).direction for k in range(6)])
        after = theory.entropy(z + eta * (ratio * advantages)[:, None] * steps)
        return ((p_sample * (after - theory.entropy(z))).sum() - eta * slope).abs()

    assert abs(torch.log2(error(ETA) / error(ETA / 2)).item() - 2) < 0.1


@pytest.mark.parametrize("off_policy", [False, True])
def test_batch_corollaries_hold_in_expectation_over_batches(off_policy: bool) -> None:
    """P4 cor. 2, 2.1, 4 and 4.1, all 3^3 batches of 3 tokens enumerated, each token with its own policy and advantages.

    The mean of D (or r D) is 0 in expectation, not in a batch; the expected exact slope of mean entropy is the expected
    *sample* covariance, so the population one is low by (1 - 1/N).
    """
    n, v = 3, 3
    z, advantages = logits(10, n, v), logits(11, n, v)
    z_sample = logits(12, n, v) if off_policy else z
    rows = torch.arange(n)
    rd = (z.log_softmax(-1) - z_sample.log_softmax(-1)).exp() * theory.centred_discriminants(z)

    def exact_slope(actions: Tensor) -> Tensor:
        return -(advantages[rows, actions] * rd[rows, actions]).mean()

    def population_covariance(actions: Tensor) -> Tensor:
        a, d = advantages[rows, actions], rd[rows, actions]
        return ((a - a.mean()) * (d - d.mean())).mean()

    p_sample = z_sample.softmax(-1)
    close(theory.batch_expectation(p_sample, lambda _: torch.ones((), dtype=torch.float64)), 1.0)
    close(theory.batch_expectation(p_sample, lambda k: rd[rows, k].mean()), 0.0)
    assert rd[rows, torch.zeros(n, dtype=torch.int64)].mean().abs() > 1e-3
    expected = theory.batch_expectation(p_sample, exact_slope)
    close(-theory.batch_expectation(p_sample, population_covariance) * n / (n - 1), expected)
    per_token = torch.stack([theory.expected_token_slope(z[t], z_sample[t], advantages[t]) for t in range(n)])
    close(expected, per_token.mean())


def test_value_gradient_is_bounded_by_entropy_for_rewards_in_the_unit_interval() -> None:
    """P0 section 2.2; a reward scale outside [0, 1] breaks the printed 2 H."""
    for seed in range(50):
        z, reward = logits(seed, 6, scale=4.0), logits(seed + 999, 6).sigmoid().round()
        assert theory.value_gradient_norm(z, reward) <= theory.entropy(z)
    z, reward = torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, 10.0], dtype=torch.float64)
    close(theory.value_gradient_norm(z, reward), 10 * 0.25 * math.sqrt(2))
    assert theory.value_gradient_norm(z, reward) > 2 * theory.entropy(z)


def test_exponential_fit() -> None:
    """Recovers a and b from exact data; R^2 = 0 for a constant reward."""
    h = torch.linspace(0.1, 1.5, 9, dtype=torch.float64)
    a, b, r2 = theory.exponential_fit(h, -0.3 * h.exp() + 0.9)
    close(a, -0.3)
    close(b, 0.9)
    close(r2, 1.0)
    close(theory.exponential_fit(h, torch.full_like(h, 0.4))[2], 0.0)
    noisy = theory.exponential_fit(h, -0.3 * h.exp() + torch.tensor([1.0, -1.0] * 4 + [1.0]))[2]
    assert 0 < noisy < 0.9
