"""Measurements inside a rollout step that a study can add to the curves: see `PROBES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ext.rl.types import LossInputs
from recipes.studies import chain
from recipes.studies.policies import Policy, entropy, log_softmax


class Watched(Protocol):
    """The attributes of the engine's training that probes read."""

    policy: Policy
    setting: Any
    optimizer: Any
    held_out: Tensor


@dataclass(frozen=True)
class Update:
    """One optimizer step of all seeds, before it is taken. Shapes: S seeds first, N tokens, K choices."""

    x: LossInputs
    pull: Tensor
    """(S, N): F A of the tokens that were kept."""
    p: Tensor
    """(S, N, K): probabilities of all choices; ``logp`` is its logarithm."""
    logp: Tensor
    gradients: list[Tensor]
    """One per parameter, after the norm is clipped."""


class Probe(Protocol):
    def __init__(self, training: Watched) -> None: ...

    def begin(self, context: Tensor) -> None:
        """Called before the first update on a batch of responses. ``context``: (S, B, 7)."""

    def before_update(self, update: Update) -> None: ...

    def after_update(self) -> None: ...

    def end(self) -> dict[str, Tensor]:
        """Values of this rollout step for the curves, (S,) each."""
        ...


class EntropyChange:
    """Predicted and measured change of entropy over a rollout step's updates, on that step's own tokens.

    ``measured`` is the change of mean entropy. The predictions are first-order sums over the updates:

    * ``predicted_token``: -eta E_B[F keep A (S - E_p[S])] over the tokens of each update, with separate logits for
      every token (Entropy Dynamics theorem 2 with the loss's own weight). Its scale differs from the other three.
    * ``predicted_gradient``: -eta <grad H, g>, where g is the norm-clipped gradient of the update and H the entropy of
      the batch.
    * ``predicted_adam``: the same with g / (sqrt(v) + eps), where v is Adam's second moment including this g: Adam
      without momentum. With SGD it equals ``predicted_gradient``.
    * ``predicted_step``: <grad H, step>, where step is the step of the optimizer, including momentum.
    """

    def __init__(self, training: Watched) -> None:
        self._t = training

    def begin(self, context: Tensor) -> None:
        counts = torch.zeros(context.shape[0], chain.CONTEXTS)
        flat = context.flatten(1)
        self._share = counts.scatter_add_(1, flat, torch.ones(flat.shape)) / flat.shape[1]
        self._before = self._mean_entropy()
        self._sums = {f"predicted_{name}": torch.zeros(len(counts)) for name in ("token", "gradient", "adam", "step")}

    def _mean_entropy(self) -> Tensor:
        return (self._share * entropy(log_softmax(self._t.policy.table()))).sum(1)

    def before_update(self, update: Update) -> None:
        x, p, logp = update.x, update.p, update.logp
        assert x.entropy is not None
        lr = self._t.setting.lr
        score = x.logp.exp() * (x.entropy + x.logp)
        expected = x.entropy * p.square().sum(-1) + (p.square() * logp).sum(-1)
        self._sums["predicted_token"] -= lr * (update.pull * (score - expected)).mean(1)
        table = log_softmax(self._t.policy.rows(None))
        slope = -table.exp() * (table + entropy(table)[..., None])  # of each context's entropy, Flexible eq. 4
        self._entropy_gradient = self._t.policy.backward(self._share[..., None] * slope)
        moments = self._t.optimizer.second_moments(update.gradients)
        scaled = update.gradients
        if moments is not None:
            eps = self._t.setting.eps
            scaled = [g / (v.sqrt() + eps) for g, v in zip(scaled, moments, strict=True)]
        self._sums["predicted_gradient"] -= lr * _inner(self._entropy_gradient, update.gradients)
        self._sums["predicted_adam"] -= lr * _inner(self._entropy_gradient, scaled)
        self._old = [q.clone() for q in self._t.policy.parameters]

    def after_update(self) -> None:
        taken = [new - old for new, old in zip(self._t.policy.parameters, self._old, strict=True)]
        self._sums["predicted_step"] += _inner(self._entropy_gradient, taken)

    def end(self) -> dict[str, Tensor]:
        return {"measured": self._mean_entropy() - self._before, **self._sums}


class Passes:
    """Measurements per pass over a batch; the suffix ``_1`` is the first pass.

    ``pass_gain``: change of accuracy on held-out prompts. ``pass_step``: norm of the change of the parameters.
    ``pass_gradient``: mean norm of the gradient. ``pass_reward`` and ``pass_penalty``: mean over tokens of the positive
    and negative part of F A after clipping.
    """

    def __init__(self, training: Watched) -> None:
        self._t = training

    def _accuracy(self) -> Tensor:
        return chain.solve_probability(log_softmax(self._t.policy.table()), self._t.held_out).mean(1)

    def begin(self, context: Tensor) -> None:
        self._updates, self._found = 0, dict[str, Tensor]()

    def before_update(self, update: Update) -> None:
        if self._updates % self._t.setting.mini_batches == 0:
            self._before, self._old = self._accuracy(), [q.clone() for q in self._t.policy.parameters]
        norm = torch.stack([g.flatten(1).square().sum(1) for g in update.gradients]).sum(0).sqrt()
        sums = {
            "gradient": norm,
            "reward": update.pull.clamp(min=0).mean(1),
            "penalty": update.pull.clamp(max=0).mean(1),
        }
        for name, value in sums.items():
            key = self._key(name)
            self._found[key] = self._found.get(key, 0.0) + value / self._t.setting.mini_batches

    def _key(self, name: str) -> str:
        return f"pass_{name}_{1 + self._updates // self._t.setting.mini_batches}"

    def after_update(self) -> None:
        last = (self._updates + 1) % self._t.setting.mini_batches == 0
        if last:
            way = [(new - old).flatten(1) for new, old in zip(self._t.policy.parameters, self._old, strict=True)]
            self._found[self._key("gain")] = self._accuracy() - self._before
            self._found[self._key("step")] = torch.stack([d.square().sum(1) for d in way]).sum(0).sqrt()
        self._updates += 1

    def end(self) -> dict[str, Tensor]:
        return self._found


PROBES: dict[str, type[Probe]] = {"entropy": EntropyChange, "passes": Passes}


def _inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).flatten(1).sum(1) for x, y in zip(a, b, strict=True)]).sum(0)
