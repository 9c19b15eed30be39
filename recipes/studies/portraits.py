"""Figures of the gradient weight of every loss, drawn from the code of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_ext.rl.losses import Loss, build_loss
from megatron_ext.rl.losses.dynamic_clip import DynamicClip
from megatron_ext.rl.schedules import build_controller
from megatron_ext.rl.selection import Selection, build_selection
from megatron_ext.rl.types import LossInputs
from recipes.studies import figures


@dataclass(frozen=True)
class Portrait:
    """A loss, an optional selection, and a sentence about what the figure shows."""

    title: str
    look: str
    params: dict[str, Any]
    selection: dict[str, Any] = field(default_factory=lambda: {"name": "none"})


PORTRAITS: dict[str, Portrait] = {
    "pg": Portrait("REINFORCE", "The weight is 1 everywhere: the loss has no bound on the ratio.", {"name": "pg"}),
    "ppo": Portrait(
        "PPO, GRPO (0.2 / 0.2)",
        "The weight drops to 0 above 1.2 for rewarded and below 0.8 for penalised tokens, and grows without limit on "
        "the other sides.",
        {"name": "ppo"},
    ),
    "dapo": Portrait(
        "clip-higher, DAPO (0.2 / 0.28)",
        "Only the upper bound differs: the ratio of rewarded tokens may grow a little further before they are clipped.",
        {"name": "ppo", "eps_high": 0.28},
    ),
    "clip_lower": Portrait(
        "Clip-Low (0.15 / off)",
        "There is no upper bound, and penalised tokens are clipped sooner: both raise entropy.",
        {"name": "ppo", "eps_low": 0.15, "eps_high": math.inf},
    ),
    "ce_gppo": Portrait(
        "CE-GPPO (0.5, 1)",
        "Beyond the bounds the weight is beta2 1.2 on the right and beta1 0.8 on the left, where PPO has 0.",
        {"name": "ce_gppo", "beta1": 0.5, "beta2": 1.0},
    ),
    "cispo": Portrait(
        "CISPO",
        "No token is dropped: the weight itself is clipped to the bounds, for both signs.",
        {"name": "cispo"},
    ),
    "gspo": Portrait(
        "GSPO",
        "The bounds apply to the mean ratio of the sequence and are close to 1. Here every sequence has one token.",
        {"name": "gspo"},
    ),
    "sapo": Portrait("SAPO", "The bounds are smooth: the weight decays to 0 instead of jumping.", {"name": "sapo"}),
    "dynamic_upper": Portrait(
        "dynamic upper bound",
        "The upper bound depends on p: it is 1.5 for unlikely tokens and 1.25 for likely ones.",
        {"name": "dynamic_clip", "strategy": "upper"},
    ),
    "dynamic_lower": Portrait(
        "dynamic lower bound",
        "The lower bound depends on p: it is 0.7 for unlikely penalised tokens and 0.83 for likely ones.",
        {"name": "dynamic_clip", "strategy": "lower"},
    ),
    "aspo": Portrait(
        "ASPO",
        "For rewarded tokens the weight is inverted: it is largest where the token has become less likely.",
        {"name": "aspo"},
    ),
    "bapo": Portrait(
        "BAPO",
        "PPO's bounds at 0.6 and 1.2, where the search for bounds starts. While penalties dominate a mini-batch, both "
        "bounds rise, to 0.9 and 3 at most.",
        {"name": "bapo"},
    ),
    "dcpo": Portrait(
        "DCPO",
        "The bounds are wide for tokens that were unlikely, and narrow for likely ones.",
        {"name": "dcpo"},
    ),
    "gmpo": Portrait(
        "GMPO",
        "The bounds are e^-0.4 and e^0.4. Tokens of a sequence share one weight; here every sequence has one token.",
        {"name": "gmpo"},
    ),
    "entropic": Portrait(
        "EntroPIC (alpha -0.5)",
        "PPO, except for tokens above p = 0.95: while entropy is below its target, rewarded ones count half and "
        "penalised ones 1.5 times.",
        {"name": "entropic", "control": -0.5},
    ),
    "entropy_shaped": Portrait(
        "entropy-shaped advantages",
        "PPO with more weight for rewarded and less for penalised tokens. The effect grows with the entropy of their "
        "state, here that of a choice between two tokens.",
        {"name": "entropy_shaped"},
    ),
    "repo_r": Portrait(
        "REPO-R (zeta 0.3)",
        "PPO with more weight for rewarded and less for penalised tokens. The effect grows as tokens get less likely. "
        "The paper's zeta ends at 0.05; 0.3 shows the shape.",
        {"name": "repo_r", "zeta": 0.3, "adaptive": False},
    ),
    "entropy_ratio": Portrait(
        "PPO with Entropy Ratio Clipping",
        "Tokens have no gradient if the entropy of their distribution has changed by more than 5 %. Here the "
        "vocabulary has two tokens.",
        {"name": "ppo"},
        {"name": "entropy_ratio"},
    ),
}


def weight(loss: Loss, logp: Tensor, old_logp: Tensor, sign: int, selection: Selection | None = None) -> Tensor:
    """F of every token, in the shape of ``logp``, for advantages equal to ``sign`` and a vocabulary of two tokens."""
    flat, old = logp.flatten().double(), old_logp.flatten().double()
    x = LossInputs(
        logp=flat,
        old_logp=old,
        advantages=torch.full_like(flat, float(sign)),
        mask=torch.ones_like(flat, dtype=torch.bool),
        seq_ids=torch.arange(len(flat)),
        entropy=_binary_entropy(flat.exp()),
        old_entropy=_binary_entropy(old.exp()),
    )
    kept = x.mask if selection is None else selection.inside(x)
    return (torch.where(kept, loss(x).gradient, 0.0) / sign).view(logp.shape)


def _binary_entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p) + torch.special.entr((1 - p).clamp(min=0))


def portrait(of: Portrait) -> Any:
    """F over the ratio for both signs of the advantage, and F over (p_old, p_new)."""
    loss, selection = build_loss(**of.params), build_selection(**of.selection)
    result, axes = figures.figure(10.5, 3.1, 1, 3)
    line, *maps = axes[0]
    ratio = torch.linspace(0.3, 2.0, 1701, dtype=torch.float64)
    for sign, style in ((1, "-"), (-1, "--")):
        for p_old, shade in ((0.1, "#000000"), (0.45, "#888888")):
            old = torch.full_like(ratio, math.log(p_old))
            label = f"A {'>' if sign > 0 else '<'} 0, p_old {p_old:g}"
            f = weight(loss, old + ratio.log(), old, sign, selection)
            line.plot(ratio, f, style, color=shade, label=label, linewidth=1.4)
    line.set(xlabel="ratio r", ylabel="gradient weight F")
    line.set_ylim(-0.05, 2.05)
    line.legend(fontsize=6.5, loc="upper left")
    grid = torch.linspace(0.01, 0.99, 197, dtype=torch.float64)
    old, new = torch.meshgrid(grid, grid, indexing="xy")
    for ax, sign in zip(maps, (1, -1), strict=True):
        values = weight(loss, new.log(), old.log(), sign, selection)
        shown = ax.imshow(values, origin="lower", extent=(0, 1, 0, 1), cmap="gray", vmin=0, vmax=2, aspect="auto")
        ax.plot([0, 1], [0, 1], color="#d1571b", linewidth=0.8)
        ax.set(xlabel="p_old", ylabel="p_new")
        ax.set_title(f"F for A {'>' if sign > 0 else '<'} 0 (black: no gradient)", fontsize=9)
        ax.grid(False)
    result.colorbar(shown, ax=maps, shrink=0.9)
    line.set_title(of.title, fontsize=10)
    return result


def bounds() -> Any:
    """Offsets of dynamic clipping over p, and offsets of its schedules over training at p = 0.05 and p = 0.95."""
    result, axes = figures.figure(10.5, 3.1, 1, 4)
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    both = DynamicClip(strategy="both")
    low, high = both.offsets(p)
    axes[0][0].plot(p, high, "-", color="black", label="upper, H(p)")
    axes[0][0].plot(p, low, "--", color="black", label="lower, M(p)")
    axes[0][0].axhline(0.2, color="#888888", linewidth=0.8)
    axes[0][0].set(xlabel="probability p", ylabel="offset")
    axes[0][0].legend(fontsize=7)
    for ax, strategy in zip(axes[0][1:], ("id", "did", "od"), strict=True):
        at = torch.tensor([0.05, 0.95], dtype=torch.float64)
        steps = range(101)
        losses = [_scheduled(strategy, k) for k in steps]
        offsets = [loss.offsets(at) for loss in losses]
        for i, (name, shade) in enumerate((("0.05", "black"), ("0.95", "#888888"))):
            ax.plot(steps, [o[1][i] for o in offsets], "-", color=shade, label=f"upper, p {name}")
            ax.plot(steps, [o[0][i] for o in offsets], "--", color=shade, label=f"lower, p {name}")
        ax.set_title(strategy.upper() + (" (entropy swings)" if strategy == "od" else ""), fontsize=9.5)
        ax.set_xlabel("step, % of the run")
        ax.set_ylim(0.1, 0.55)
    axes[0][1].legend(fontsize=6.5)
    return result


def _scheduled(strategy: str, step: int) -> DynamicClip:
    if strategy == "od":
        return DynamicClip(strategy="od", state=1 if step // 20 % 2 else 0)
    return DynamicClip(strategy=strategy, step=step, total_steps=100)  # type: ignore[arg-type]


def controller() -> Any:
    """CE-GPPO's betas under the closed loop, as functions of the entropy error."""
    result, axes = figures.figure(4.6, 3.0)
    response = axes[0][0]
    loop = build_controller("ce_gppo", {"beta1": 0.5, "beta2": 0.75}, "entropy_target", curve="constant", start=1.0)
    errors = [e / 100 for e in range(-100, 101, 2)]
    settings = []
    for error in errors:
        state = loop.observe(loop.init(), step=0, total_steps=100, entropy=1.0)
        state = loop.observe(state, step=1, total_steps=100, entropy=1.0 + error)
        settings.append(loop.loss_params(state, step=1, total_steps=100))
    for key, style in (("beta1", "-"), ("beta2", "--")):
        response.plot(errors, [s[key] for s in settings], style, color="black", label=key)
    response.set(xlabel="(entropy - target) / first entropy", ylabel="parameter")
    response.legend()
    return result
