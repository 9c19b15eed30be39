"""Diagnostics of a batch: what an optimizer step does to the entropy, and where its gradient comes from.

Pure: torch only, no gradient flows through anything here. Shape (T,): tokens, flat, in any packing. Entropies in nats.
Papers: Flexible Entropy Control, CE-GPPO, Clip-Low/High, Entropy Dynamics (Clip_B / Clip_V).

Notation: ``S = p (H + log p)`` of the token taken (Clip-Low/High calls it Q), ``D = S - E_p[S]``, ``r = pi_theta /
pi_old``.

`diagnostic_sums` returns additive float64 scalars, including their denominators: add them over micro-batches, ranks
and updates, then call `diagnostics` once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.rl.objective import Objective
from megatron_ext.rl.types import LossInputs, TokenStats

REGIONS = ("E1", "E2", "E3", "E4")
QUADRANTS = ("PA_HP", "PA_LP", "NA_HP", "NA_LP")


def discriminant(stats: TokenStats) -> Tensor:
    """S = p (H + log p) of the token taken, float64 (T,).

    Entropy Dynamics thm 1: raising its logit by eps changes H by -eps S.
    """
    logp = stats.logp.double()
    return logp.exp() * (stats.entropy.double() + logp)


def expected_discriminant(stats: TokenStats) -> Tensor:
    """E_p[S] = sum_v p_v^2 (H + log p_v) = H sum p^2 + sum p^2 log p, float64 (T,). Entropy Dynamics theorem 2."""
    return stats.entropy.double() * stats.sum_p2.double() + stats.sum_p2_logp.double()


def centred_discriminant(stats: TokenStats) -> Tensor:
    """D = S - E_p[S], float64 (T,).

    Entropy Dynamics thm 2: a step eta along the gradient of log p changes H by -eta D.
    """
    return discriminant(stats) - expected_discriminant(stats)


def score_norm(stats: TokenStats) -> Tensor:
    """``||d log p / d z||_2 = ||e_y - p||_2 = sqrt(1 - 2 p + sum p^2)``, (T,): a token's gradient at the logits."""
    return (1 - 2 * stats.logp.exp() + stats.sum_p2).clamp(min=0).sqrt()


def region_masks(logp: Tensor, ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """E1 to E4 of Flexible Entropy Control section 3, bool (T,).

    E1/E2 = A > 0, 1 < r < 1.3, p > 0.7 / p <= 0.3; E3/E4 = A < 0, 0.7 < r < 1 and the same p. Flexible Entropy
    Control also writes p < 0.3 for the low side; its figure 2 has p <= 0.3.
    """
    prob = logp.exp()
    raised = (advantages > 0) & (ratio > 1) & (ratio < 1.3)
    lowered = (advantages < 0) & (ratio > 0.7) & (ratio < 1)
    high, low = prob > 0.7, prob <= 0.3
    return {"E1": raised & high, "E2": raised & low, "E3": lowered & high, "E4": lowered & low}


def quadrant_masks(logp: Tensor, advantages: Tensor, hp_threshold: float = 0.5) -> dict[str, Tensor]:
    """CE-GPPO figure 1: positive (PA) or negative (NA) advantage x high (HP) or low (LP) probability.

    A token is HP above ``hp_threshold``. CE-GPPO gives no number; 0.5 is ours.
    """
    high = logp.exp() > hp_threshold
    positive, negative = advantages > 0, advantages < 0
    return {"PA_HP": positive & high, "PA_LP": positive & ~high, "NA_HP": negative & high, "NA_LP": negative & ~high}


def diagnostic_sums(stats: TokenStats, x: LossInputs, objective: Objective) -> dict[str, Tensor]:
    """All sums that `diagnostics` needs, as additive float64 scalars.

    Args:
        stats: statistics under the current weights, from the forward pass of the update.
        x: the inputs of the loss; tokens outside ``x.mask`` may hold anything, NaN included.
        objective: `megatron_ext.rl.objective.evaluate` of it.
    """
    mask = x.mask
    stats = TokenStats(*(_masked(v, mask) for v in (stats.logp, stats.entropy, stats.sum_p2, stats.sum_p2_logp)))
    advantages, old_logp = _masked(x.advantages, mask), _masked(x.old_logp, mask)
    ratio = torch.where(mask, (stats.logp - old_logp).exp(), 0.0)
    ascent, entropy_ascent = objective.ascent.double(), objective.entropy_ascent.double()
    centred = centred_discriminant(stats)
    # The gradient of H at the logits is -S; its squared norm, sum_v S_v^2 = E_p[p (H + log p)^2], from the token taken.
    bonus = ratio * stats.logp.exp() * (stats.entropy + stats.logp).square()
    mass = ascent.abs() * score_norm(stats)
    sums = {
        "tokens": mask.sum().double(),
        "slope": (entropy_ascent * bonus - ascent * centred).sum(),
        "a": advantages.sum(),
        "rd": (ratio * centred).sum(),
        "ard": (advantages * ratio * centred).sum(),
        "grad": mass.sum(),
    }
    # Tokens come from pi_old, so r turns their sums into expectations under pi_theta.
    for side, event in (("low", objective.outputs.below & mask), ("high", objective.outputs.above & mask)):
        sums[f"{side}_r"] = torch.where(event, ratio, 0.0).sum()
        sums[f"{side}_gap"] = torch.where(event, -ratio * centred, 0.0).sum()
    groups = region_masks(stats.logp, ratio, advantages) | quadrant_masks(stats.logp, advantages)
    for name, member in groups.items():
        sums[f"tokens/{name}"] = (member & mask).sum().double()
        sums[f"grad/{name}"] = torch.where(member & mask, mass, 0.0).sum()
    return sums


def diagnostics(sums: dict[str, Tensor], *, updates: int = 1) -> dict[str, Tensor]:
    """Numbers to log from the sums of ``updates`` optimizer steps; 0 where there is nothing to average.

    * ``entropy_slope``: -E[F keep A D], with the token weights of the objective, plus the terms of its penalties and
      its entropy bonus (the latter uses the sampled token only, so it is unbiased but noisy). Times the learning rate,
      it is the first-order change of the mean entropy in one step of plain gradient descent on independent logits.
      Under Adam only its sign and its correlation are meaningful, not its size.
    * ``entropy_slope_unclipped``: -Cov(A, r D) over all tokens, Entropy Dynamics cor. 4.1. It does not depend on the
      loss: clipping, preserved gradients and token selection do not change it.
    * ``tokens/<region>``, ``grad/<region>``: share of response tokens, and of gradient mass |d objective / d logp|
      ||e_y - p||, in Flexible Entropy Control's E1..E4 and in CE-GPPO's positive/negative advantage x high/low
      probability. A token that a bound or a selection drops has no mass.
    * ``q_gap_low``, ``q_gap_high``: E[Q] - E[Q|X] and E[Q] - E[Q|Y] (Clip-Low/High eq. 7), expectations under
      pi_theta. X and Y are the tokens below and above the bounds of the loss, weighted by r; each is compared with
      E_p[S] of its own state.
    * ``clip_low_term``, ``clip_high_term``: p_k and q_k times these (Clip-Low/High theorem 1), the mean over all
    tokens.
    """
    n = sums["tokens"]
    mean = {name: ratio_or_zero(sums[name], n) for name in ("a", "rd", "ard", "low_gap", "high_gap")}
    out = {
        "entropy_slope": sums["slope"] / max(updates, 1),
        "entropy_slope_unclipped": mean["a"] * mean["rd"] - mean["ard"],
        "q_gap_low": ratio_or_zero(sums["low_gap"], sums["low_r"]),
        "q_gap_high": ratio_or_zero(sums["high_gap"], sums["high_r"]),
        "clip_low_term": mean["low_gap"],
        "clip_high_term": mean["high_gap"],
    }
    for name in REGIONS + QUADRANTS:
        out[f"tokens/{name}"] = ratio_or_zero(sums[f"tokens/{name}"], n)
        out[f"grad/{name}"] = ratio_or_zero(sums[f"grad/{name}"], sums["grad"])
    return out


def ratio_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0."""
    return torch.where(denominator != 0, numerator / denominator, 0.0)


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x.detach().double(), 0.0)
