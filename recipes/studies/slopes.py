"""Measured and predicted change of entropy after one small step of every loss and selection, on a tabular softmax.

Measured: the entropy after a step up and a step down the gradient of the whole objective, by finite difference.
Predicted: ``theory/entropy_slope``, from the sampled tokens alone. Float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.rl import diagnostics
from megatron_ext.rl.aggregation import sequence_weights
from megatron_ext.rl.losses import LOSSES, Loss, build_loss
from megatron_ext.rl.objective import Coefficients, Objective, evaluate
from megatron_ext.rl.selection import Selection, SelectionInputs, build_selection
from megatron_ext.rl.types import LossInputs, TokenStats

F64 = torch.float64
ACTIONS = (0, 0, 0, 0, 1, 1, 2, 3)  # each action exactly in proportion to its probability under pi_old
P_OLD = (4 / 8, 2 / 8, 1 / 8, 1 / 8)


def statistics(z_TV: Tensor, actions_T: Tensor) -> TokenStats:
    """Token statistics of logits (T, V). log p and H are differentiable."""
    logp_TV = z_TV.log_softmax(-1)
    p_TV = logp_TV.exp()
    logp = logp_TV.gather(-1, actions_T[:, None]).squeeze(-1)
    sums = (p_TV.square().sum(-1).detach(), (p_TV.square() * logp_TV).sum(-1).detach())
    return TokenStats(logp, -(p_TV * logp_TV).sum(-1), *sums)


@dataclass
class TabularBatch:
    """A batch with eight tokens per state and two states per response. One response in six is masked."""

    z_old_TV: Tensor
    z_TV: Tensor
    actions: Tensor
    advantages: Tensor
    mask: Tensor
    seq_ids: Tensor
    weights: Tensor  # of ``seq_mean_token_mean``

    def inputs(self, z_TV: Tensor) -> tuple[LossInputs, TokenStats]:
        stats, old = statistics(z_TV, self.actions), statistics(self.z_old_TV, self.actions)
        x = LossInputs(stats.logp, old.logp, self.advantages, self.mask, self.seq_ids, stats.entropy, old.entropy)
        return x, stats

    def objective(self, z_TV: Tensor, loss: Loss, selection: Selection) -> tuple[Objective, LossInputs, TokenStats]:
        """The objective of the policy with these logits. The selection uses the old logits."""
        positions = torch.arange(len(self.actions))
        old = statistics(self.z_old_TV, self.actions)
        chosen = selection.select(
            SelectionInputs(old, self.advantages, self.mask, self.seq_ids, positions, seed=0, step=0)
        )
        x, stats = self.inputs(z_TV)
        keep = chosen.keep & selection.inside(x)
        c = Coefficients(self.weights, keep, chosen.kl_coef, chosen.entropy_coef, loss_weight=chosen.weight)
        return evaluate(loss, x, c), x, stats


def tabular_batch(seed: int = 0, states: int = 60, drift: float = 0.5, calibration: float = 0.0) -> TabularBatch:
    """A batch with a random advantage per response.

    Args:
        drift: standard deviation of the change of the logits since the batch was sampled.
        calibration: added to the advantages per nat of centred log p_old.
    """
    g = torch.Generator().manual_seed(seed)
    actions = torch.tensor(ACTIONS).repeat(states)
    z_old = torch.tensor(P_OLD, dtype=F64).log().expand(states, len(P_OLD))
    z = z_old + drift * torch.randn(z_old.shape, generator=g, dtype=F64)
    seq_ids = torch.arange(len(actions)) // (2 * len(ACTIONS))
    advantages = torch.randn(int(seq_ids.max()) + 1, generator=g, dtype=F64)[seq_ids]
    old_logp = torch.tensor(P_OLD, dtype=F64).log()[actions]
    advantages = advantages + calibration * (old_logp - old_logp.mean())
    mask = seq_ids % 6 != 5
    lengths = torch.bincount(seq_ids[mask], minlength=int(seq_ids.max()) + 1)
    weights = sequence_weights("seq_mean_token_mean", lengths, torch.arange(len(lengths)))[seq_ids]
    z_old_TV, z_TV = (v.repeat_interleave(len(ACTIONS), dim=0) for v in (z_old, z))
    return TabularBatch(z_old_TV, z_TV, actions, advantages, mask, seq_ids, weights)


def slopes(batch: TabularBatch, loss: Loss, selection: Selection) -> tuple[float, float, float]:
    """(measured, predicted, predicted without clipping) change of entropy per unit of step size."""
    z = batch.z_TV.clone().requires_grad_()
    objective, x, stats = batch.objective(z, loss, selection)
    (gradient,) = torch.autograd.grad(objective.total, z)
    found = diagnostics.diagnostics(diagnostics.diagnostic_sums(stats, x, objective))
    eta = 1e-3 / float(gradient.abs().max())
    up, down = (statistics(batch.z_TV - step * gradient, batch.actions).entropy.sum() for step in (eta, -eta))
    measured = float((up - down) / (2 * eta))
    return measured, float(found["entropy_slope"]), float(found["entropy_slope_unclipped"])


LOSS_PARAMS: dict[str, dict[str, Any]] = {
    "dynamic_clip": {"strategy": "both"},
    "gspo": {"eps_low": 0.05, "eps_high": 0.05},  # some sequences are clipped, some are not
    "entropic": {"likely": 0.4, "control": -0.5},
    "repo_r": {"zeta": 0.05},
}
SELECTIONS: Mapping[str, dict[str, Any]] = {
    "none": {"name": "none"},
    "Clip_B 0.5": {"name": "clip_b", "mu_low": 0.5},
    "S > 0, A > 0 dropped": {"name": "region", "region": "s_positive"},
    "KL-Cov 0.2": {"name": "kl_cov", "frac": 0.2},
    "ERC (0.8, 1.2)": {"name": "entropy_ratio", "low": 0.8, "high": 1.2},
    "STEER 0.5": {"name": "steer", "weight_min": 0.5},
}


def table(states: int = 400) -> str:
    """A Markdown table: one row per loss, one column per selection, cells "measured / predicted"."""
    batch = tabular_batch(states=states, calibration=0.5)
    losses = {name: {"name": name, **LOSS_PARAMS.get(name, {})} for name in LOSSES}
    losses |= {
        f"ce_gppo ({b1:g}, {b2:g})": {"name": "ce_gppo", "beta1": b1, "beta2": b2} for b1, b2 in ((0, 1), (1, 0.5))
    }
    lines = ["| loss | " + " | ".join(SELECTIONS) + " |", "|---" * (len(SELECTIONS) + 1) + "|"]
    for name, params in losses.items():
        found = [slopes(batch, build_loss(**params), build_selection(**s)) for s in SELECTIONS.values()]
        lines.append(f"| `{name}` | " + " | ".join(f"{m:+.4f} / {p:+.4f}" for m, p, _ in found) + " |")
    unclipped = slopes(batch, build_loss("ppo"), build_selection("none"))[2]
    return "\n".join(
        [*lines, "", f"Without clipping or selection the formula of cor. 4.1 gives {unclipped:+.4f} for all."]
    )
