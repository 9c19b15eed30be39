"""The theorems of the papers, checked by taking the step; the batch diagnostics, checked by hand and by enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels import vocab_statistics
from megatron_ext.rl import entropy_theory as theory
from megatron_ext.rl.types import TokenStats

ETA = 1e-3


def logits(seed: int, *shape: int, scale: float = 1.5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def close(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def holds(z: Tensor, claim: theory.FirstOrder) -> bool:
    """Halving the step quarters the error: 2 up to the third-order term."""
    return abs(theory.residual_order(z, claim, ETA).item() - 2) < 0.1


# --- theorems ----------------------------------------------------------------------------------------------------


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


# --- diagnostics of a batch --------------------------------------------------------------------------------------


def batch(seed: int, tokens: int = 40, vocab: int = 6) -> tuple[Tensor, Tensor, TokenStats, Tensor, Tensor, Tensor]:
    """logits, actions, statistics, old logp, advantages, mask."""
    z = logits(seed, tokens, vocab)
    z_old = z + logits(seed + 1, tokens, vocab, scale=0.3)
    actions = torch.multinomial(z_old.softmax(-1), 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    old_logp = z_old.log_softmax(-1).gather(1, actions[:, None]).squeeze(1)
    mask = torch.arange(tokens) % 5 != 0
    return z, actions, vocab_statistics(z, actions), old_logp, logits(seed + 2, tokens), mask


def test_token_quantities_equal_the_tabular_ones() -> None:
    z, actions, stats, *_ = batch(0)
    s = theory.discriminants(z)
    close(theory.discriminant(stats), s.gather(1, actions[:, None]).squeeze(1))
    close(theory.expected_discriminant(stats), (z.softmax(-1) * s).sum(-1))
    score = torch.nn.functional.one_hot(actions, z.shape[1]) - z.softmax(-1)
    close(theory.score_norm(stats), score.norm(dim=-1))


def test_entropy_slope_is_the_masked_covariance() -> None:
    z, actions, stats, old_logp, advantages, mask = batch(1)
    got = theory.diagnostics(theory.diagnostic_sums(stats, old_logp, advantages, mask))
    d = theory.centred_discriminants(z).gather(1, actions[:, None]).squeeze(1)
    rd, a = ((stats.logp - old_logp).exp() * d)[mask], advantages[mask]
    close(got["entropy_slope"], -((a - a.mean()) * (rd - rd.mean())).mean())
    close(got["entropy_slope_raw"], -(a * rd).mean())


def test_entropy_slope_raw_predicts_the_measured_change() -> None:
    """One step of every token's own logits along r A grad log p, measured on the same tokens."""
    z, actions, stats, old_logp, advantages, mask = batch(2)
    slope = theory.diagnostics(theory.diagnostic_sums(stats, old_logp, advantages, mask))["entropy_slope_raw"]
    score = torch.nn.functional.one_hot(actions, z.shape[1]) - z.softmax(-1)
    step = ((stats.logp - old_logp).exp() * advantages)[:, None] * score

    def error(eta: float) -> Tensor:
        return ((theory.entropy(z + eta * step) - theory.entropy(z))[mask].mean() - eta * slope).abs()

    assert abs(torch.log2(error(ETA) / error(ETA / 2)).item() - 2) < 0.1


def test_sums_add_up_over_any_cut_and_ignore_what_is_masked() -> None:
    _, _, stats, old_logp, advantages, mask = batch(3)
    whole = theory.diagnostic_sums(stats, old_logp, advantages, mask)
    spoiled = [torch.where(mask, x, float("nan")) for x in (stats.logp, stats.entropy, stats.sum_p2, stats.sum_p2_logp)]
    old_nan = torch.where(mask, old_logp, float("nan"))
    parts: list[dict[str, Tensor]] = []
    for rows in (slice(0, 7), slice(7, 8), slice(8, 40)):
        cut = TokenStats(*(x[rows] for x in spoiled))
        parts.append(theory.diagnostic_sums(cut, old_nan[rows], advantages[rows], mask[rows]))
    for name, value in whole.items():
        assert value.dtype == torch.float64 and value.dim() == 0
        close(torch.stack([part[name] for part in parts]).sum(), value)


def test_an_empty_mask_gives_zeros() -> None:
    _, _, stats, old_logp, advantages, mask = batch(4)
    got = theory.diagnostics(theory.diagnostic_sums(stats, old_logp, advantages, torch.zeros_like(mask)))
    assert all(value == 0 for value in got.values())


def test_regions_by_hand() -> None:
    """p, r, A of eleven tokens and where each belongs; boundaries: p = 0.3 is low, p = 0.7 is neither."""
    cases = [
        (0.8, 1.1, 1.0, "E1", "PA_HP"),
        (0.2, 1.1, 1.0, "E2", "PA_LP"),
        (0.3, 1.2, 1.0, "E2", "PA_LP"),
        (0.8, 0.9, -1.0, "E3", "NA_HP"),
        (0.1, 0.9, -1.0, "E4", "NA_LP"),
        (0.5, 1.1, 1.0, None, "PA_LP"),
        (0.6, 1.1, 1.0, None, "PA_HP"),
        (0.8, 0.9, 1.0, None, "PA_HP"),
        (0.1, 1.4, 1.0, None, "PA_LP"),
        (0.1, 0.6, -1.0, None, "NA_LP"),
        (0.8, 1.1, 0.0, None, None),
    ]
    # exp(log 0.3) may round to just above 0.3, hence the nudge.
    logp = torch.tensor([c[0] for c in cases], dtype=torch.float64).log()
    logp[2] = math.log(0.3) - 1e-12
    ratio = torch.tensor([c[1] for c in cases], dtype=torch.float64)
    advantages = torch.tensor([c[2] for c in cases], dtype=torch.float64)
    regions = theory.region_masks(logp, ratio, advantages)
    quadrants = theory.quadrant_masks(logp, advantages)
    for i, (*_, region, quadrant) in enumerate(cases):
        assert [name for name, member in regions.items() if member[i]] == ([region] if region else [])
        assert [name for name, member in quadrants.items() if member[i]] == ([quadrant] if quadrant else [])
    assert tuple(regions) == theory.REGIONS and tuple(quadrants) == theory.QUADRANTS


def test_shares_of_tokens_and_of_gradient_mass() -> None:
    """Two-action states with p = 0.8 (A = 1) and p = 0.2 (A = -1): the score norms are 0.2 sqrt 2 and 0.8 sqrt 2."""
    p = torch.tensor([0.8, 0.2, 0.2, 0.2], dtype=torch.float64)
    q = 1 - p
    h = -(p * p.log() + q * q.log())
    stats = TokenStats(p.log(), h, p * p + q * q, p * p * p.log() + q * q * q.log())
    advantages = torch.tensor([1.0, -1.0, -1.0, 9.0], dtype=torch.float64)
    mask = torch.tensor([True, True, True, False])
    got = theory.diagnostics(theory.diagnostic_sums(stats, stats.logp, advantages, mask))
    close(got["tokens/PA_HP"], 1 / 3)
    close(got["tokens/NA_LP"], 2 / 3)
    close(got["grad/PA_HP"], 0.2 / (0.2 + 0.8 + 0.8))
    close(got["grad/NA_LP"], 1.6 / 1.8)
    assert got["tokens/E1"] == 0  # r = 1 exactly is in no region
    weight = torch.tensor([4.0, 0.5, 0.5, 7.0])
    weighted = theory.diagnostic_sums(stats, stats.logp, advantages, mask, grad_weight=weight)
    close(theory.diagnostics(weighted)["grad/PA_HP"], 0.8 / (0.8 + 0.4 + 0.4))


def test_clip_terms_estimate_theorem_1() -> None:
    """Each state with every action once per its probability under pi_old (an exact batch): the terms are P3's."""
    p_old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)  # 10 draws: 5, 3, 2 times
    z_old = p_old.log()
    z = z_old + torch.tensor([0.5, -0.7, 0.1], dtype=torch.float64)
    actions = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    stats = vocab_statistics(z.expand(10, 3), actions)
    old_logp = z_old[actions]
    sums = theory.diagnostic_sums(stats, old_logp, torch.ones(10), torch.ones(10, dtype=torch.bool))
    got = theory.diagnostics(sums)
    p, s = z.softmax(-1), theory.discriminants(z)
    low, high = theory.clip_events(z, z_old, eps_low=0.2, eps_high=0.2)
    assert low.tolist() == [0, 1, 0] and high.tolist() == [1, 0, 0]
    mean_q = (p * s).sum()
    close(got["q_gap_low"], mean_q - s[1])
    close(got["q_gap_high"], mean_q - s[0])
    slope = theory.clipped_gradient(z, z_old, eps_low=0.2, eps_high=0.2).slope
    close(got["clip_low_term"] - got["clip_high_term"], slope)


def test_clip_events_take_bounds_per_token() -> None:
    _, _, stats, old_logp, advantages, mask = batch(5)
    wide = theory.diagnostic_sums(stats, old_logp, advantages, mask, eps_low=1.0, eps_high=math.inf)
    assert wide["low_r"] == 0 and wide["high_r"] == 0
    same = torch.full((40,), 0.1)
    scalar = theory.diagnostic_sums(stats, old_logp, advantages, mask, eps_low=0.1, eps_high=0.1)
    tensor = theory.diagnostic_sums(stats, old_logp, advantages, mask, eps_low=same.double(), eps_high=same.double())
    assert scalar["low_r"] > 0
    close(tensor["low_r"], scalar["low_r"], 1e-6)
