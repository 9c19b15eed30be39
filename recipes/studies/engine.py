"""Reinforcement learning on the chain task, vectorised over seeds, with the losses, selections and schedules of the
project. One call trains one method for many seeds.

This is the loop of `recipes.train` without Megatron and text: rollouts, rewards, statistics, advantages, selection,
then ``epochs`` passes of ``mini_batches`` optimizer steps. Seeds are independent: no loss, selection, norm or step
mixes them.
Shapes: S seeds, B responses, N tokens of a seed's (mini-)batch, K contexts, V choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_ext.rl.advantages import compute_advantages
from megatron_ext.rl.losses import Loss, build_loss
from megatron_ext.rl.schedules import Controller, build_controller
from megatron_ext.rl.selection import Selection, SelectionInputs, build_selection
from megatron_ext.rl.types import LossInputs, TokenStats
from recipes.studies import chain
from recipes.studies.policies import Network, Policy, Table, entropy, log_softmax, warm_started
from recipes.studies.probes import PROBES, Update

EVALUATION_PROMPTS = 512
PASS_K = 8
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method to compare: loss, selection and schedule, each with its parameters, as in a run's configuration."""

    loss: Mapping[str, Any]
    selection: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    schedule: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    advantage: str = "grpo"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings shared by all methods of a comparison."""

    level: str = "L1"
    """L1: a table of logits. L2: a small network with shared weights."""
    steps: int = 100
    prompts: int = 32
    n: int = 8
    mini_batches: int = 16
    epochs: int = 1
    lr: float = 0.05
    optimizer: str = "adam"
    """adam | amsgrad (Adam with second moments that never fall) | sgd"""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's betas."""
    reward: str = "answer"
    """answer: 1 if right. random: 1 with probability 1/2, independent of the answer."""
    # Fields with repr=False were added after the committed results. At their default they do not change a digest.
    eps: float = field(default=1e-8, repr=False)
    """Adam's eps."""


Curves = dict[str, Tensor]
"""Name -> (S, steps + 1). Value i is measured after i steps; a quantity of one step is in the column of the step's end.
Accuracies are nan except at `evaluation_steps`."""


def evaluation_steps(setting: Setting) -> list[int]:
    """Steps after which accuracy is computed: about 25, including the first and the last."""
    every = max(1, setting.steps // 25)
    return sorted({*range(0, setting.steps + 1, every), setting.steps})


def train(
    setting: Setting,
    method: Method,
    seeds: list[int],
    *,
    probe: str = "",
    progress: Callable[[int], None] = lambda step: None,
) -> Curves:
    """Train ``method`` for every seed, each from its own start.

    Returns:
        ``entropy`` (nats per response token of the batch), ``reward`` (of the batch), ``avg`` and ``pass`` (exact
        accuracy and pass@8 over held-out prompts), ``clip_low``, ``clip_high``, ``kl``. With ``probe`` also the curves
        of that probe of `PROBES`.
    """
    with torch.no_grad():
        return _Training(setting, method, seeds, probe).run(progress)


def start(setting: Setting, seeds: list[int]) -> Policy:
    """The policy before the first step. The warm start of a network is cached in this process."""
    if setting.level == "L1":
        return Table(chain.start_logits(seeds))
    key = tuple(seeds)
    if key not in _warm:
        _warm.clear()
        _warm[key] = [p.clone() for p in warm_started(seeds).parameters]
    network = Network(seeds)
    network.parameters = [p.clone() for p in _warm[key]]
    return network


_warm: dict[tuple[int, ...], list[Tensor]] = {}


@dataclass
class _Batch:
    """Rollouts of one step. Every field is per token, (S, B, 7)."""

    context: Tensor
    choice: Tensor
    old_logp: Tensor
    old_entropy: Tensor
    advantage: Tensor
    keep: Tensor
    kl_coef: Tensor
    entropy_coef: Tensor
    weight: Tensor

    def slice(self, rows: slice) -> _Batch:
        return _Batch(*(getattr(self, name)[:, rows] for name in self.__dataclass_fields__))


class _Training:
    def __init__(self, setting: Setting, method: Method, seeds: list[int], probe: str) -> None:
        self.setting, self.method, self.seeds = setting, method, seeds
        self.policy = start(setting, seeds)
        self.draws = chain.Draws(seeds)
        loss_params = {k: v for k, v in method.loss.items() if k != "name"}
        self.loss_name, self.loss_params = str(method.loss["name"]), loss_params
        schedule = dict(method.schedule)
        self.controller: Controller = build_controller(self.loss_name, loss_params, schedule.pop("name"), **schedule)
        self.states = [self.controller.init() for _ in seeds]
        self.selection: Selection = build_selection(**method.selection)
        self.held_out = chain.Draws([987_654_321]).prompts(EVALUATION_PROMPTS)[0]
        self.optimizer = _Optimizer(self.policy.parameters, setting)
        self.probe = PROBES[probe](self) if probe else None
        self.curves: dict[str, list[Tensor]] = {}
        self.evaluated = set(evaluation_steps(setting))

    def run(self, progress: Callable[[int], None]) -> Curves:
        for step in range(self.setting.steps):
            self._step(step)
            progress(step + 1)
        # Value i of a curve is measured after i steps. Entropy, reward and accuracy are measured once more at the end;
        # quantities of a step get an empty first value.
        self._measure(self.setting.steps, *self._rollout())
        empty = torch.full((len(self.seeds),), float("nan"))
        for values in self.curves.values():
            if len(values) == self.setting.steps:
                values.insert(0, empty)
        return {name: torch.stack(values, dim=1) for name, values in self.curves.items()}

    def _log(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.curves.setdefault(name, []).append(value)

    def _rollout(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities (S, K, V), contexts and choices (S, B, 7), rewards (S, B)."""
        s = self.setting
        logp = log_softmax(self.policy.table())
        prompts = self.draws.prompts(s.prompts).repeat_interleave(s.n, 1)
        context, choice = chain.sample(logp, prompts, self.draws.uniform(s.prompts * s.n, chain.TOKENS))
        if s.reward == "random":
            reward = (self.draws.uniform(s.prompts * s.n) < 0.5).float()
        else:
            reward = (choice[..., -1] == chain.answers(prompts)).float()
        return logp, context, choice, reward

    def _measure(self, step: int, logp: Tensor, context: Tensor, choice: Tensor, reward: Tensor) -> Tensor:
        """Log entropy, reward and accuracy of the current policy. Returns the entropy of each seed's batch, (S,)."""
        mean = entropy(logp).gather(1, context.flatten(1)).mean(1)
        if step in self.evaluated:
            solved = chain.solve_probability(logp, self.held_out).clamp(0, 1)
        else:
            solved = torch.full((len(self.seeds), 1), float("nan"))
        passed = 1 - (1 - solved) ** PASS_K
        self._log(entropy=mean, reward=reward.mean(1), avg=solved.mean(1), **{"pass": passed.mean(1)})
        return mean

    def _step(self, step: int) -> None:
        s = self.setting
        logp, context, choice, reward = self._rollout()
        losses = self._losses(step, self._measure(step, logp, context, choice, reward))
        batch = self._select(step, logp, context, choice, reward)
        size = s.prompts * s.n // s.mini_batches
        sums: dict[str, Tensor] = {}
        if self.probe:
            self.probe.begin(context)
        for _ in range(s.epochs):
            for first in range(0, s.prompts * s.n, size):
                for name, value in self._update(batch.slice(slice(first, first + size)), losses).items():
                    sums[name] = sums.get(name, 0.0) + value
        self._log(**{name: value / (s.epochs * s.mini_batches) for name, value in sums.items()})
        if self.probe:
            self._log(**self.probe.end())

    def _losses(self, step: int, entropies: Tensor) -> list[tuple[Loss, Tensor]]:
        """Losses of this step, each with the int64 indices of its seeds. Controllers may differ between seeds."""
        total = self.setting.steps
        self.states = [
            self.controller.observe(state, step=step, total_steps=total, entropy=max(float(h), 0.0))
            for state, h in zip(self.states, entropies, strict=True)
        ]
        groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
        for i, state in enumerate(self.states):
            params = {**self.loss_params, **self.controller.loss_params(state, step=step, total_steps=total)}
            groups.setdefault(tuple(sorted(params.items())), []).append(i)
        return [(build_loss(self.loss_name, **dict(params)), torch.tensor(of)) for params, of in groups.items()]

    def _select(self, step: int, logp: Tensor, context: Tensor, choice: Tensor, reward: Tensor) -> _Batch:
        """Compute advantages and select tokens; seed by seed where the selection needs batch statistics."""
        s, shape = len(self.seeds), context.shape
        rows = torch.arange(s)[:, None, None]
        old = logp[rows, context, choice]
        groups = torch.arange(shape[1]) // self.setting.n
        if self.method.selection["name"] == "unlikely":
            shaped = [self.selection.shape_rewards(reward[i], groups, old[i].sum(-1)) for i in range(s)]
            reward = torch.stack(shaped)
        offset = (groups.max() + 1) * torch.arange(s)[:, None]
        flat = compute_advantages(self.method.advantage, reward.flatten(), (groups + offset).flatten())
        advantage = flat.view(s, -1).to(logp.dtype)[..., None].expand(shape)
        keep, weight = torch.ones(shape, dtype=torch.bool), torch.ones(shape)
        bonus = torch.tensor([self.controller.entropy_coef(state, step=step) for state in self.states])
        kl_coef, entropy_coef = torch.zeros(shape), bonus[:, None, None].expand(shape).clone()
        if self.method.selection["name"] != "none":
            stats = [x.gather(1, context.flatten(1)).view(shape) for x in _context_statistics(logp)]
            positions = torch.arange(chain.TOKENS).expand(shape[1:]).flatten()
            seq_ids = step * shape[1] + torch.arange(shape[1])[:, None].expand(shape[1:]).flatten()
            for i in range(s):
                out = self.selection.select(
                    SelectionInputs(
                        stats=TokenStats(old[i].flatten(), *(x[i].flatten() for x in stats)),
                        advantages=advantage[i].flatten(),
                        mask=keep[i].flatten(),
                        seq_ids=seq_ids,
                        positions=positions,
                        seed=self.seeds[i],
                        step=step,
                    )
                )
                keep[i] = out.keep.view(shape[1:])
                if out.weight is not None:
                    weight[i] = out.weight.view(shape[1:])
                kl_coef[i] = out.kl_coef.view(shape[1:])
                entropy_coef[i] += out.entropy_coef.view(shape[1:])
        old_entropy = entropy(logp).gather(1, context.flatten(1)).view(shape)
        return _Batch(context, choice, old, old_entropy, advantage, keep, kl_coef, entropy_coef, weight)

    def _update(self, mini: _Batch, losses: list[tuple[Loss, Tensor]]) -> dict[str, Tensor]:
        """Take one optimizer step for every seed. Returns the metrics of the step, (S,) each."""
        s = len(self.seeds)
        context, choice = mini.context.flatten(1), mini.choice.flatten(1)
        logits = self.policy.rows(context)
        all_logp = log_softmax(logits)
        p = all_logp.exp()
        logp = all_logp.gather(2, choice[..., None]).squeeze(2)
        x = LossInputs(
            logp=logp,
            old_logp=mini.old_logp.flatten(1),
            advantages=mini.advantage.flatten(1),
            mask=torch.ones_like(logp, dtype=torch.bool),
            seq_ids=(torch.arange(s * mini.choice.shape[1]).view(s, -1, 1).expand(mini.choice.shape)).flatten(1),
            entropy=-(p * all_logp).sum(-1),
            old_entropy=mini.old_entropy.flatten(1),
        )
        gradient, low, high = _per_token(losses, x)
        keep = mini.keep.flatten(1) & self.selection.inside(x)
        pull = torch.where(keep, gradient * mini.weight.flatten(1), 0.0)
        pull = pull - mini.kl_coef.flatten(1) * (logp - x.old_logp).sign()
        tokens = logp.shape[1]
        onehot = torch.nn.functional.one_hot(choice, chain.CHOICES)
        ascent = pull[..., None] * (onehot - p)
        if (coef := mini.entropy_coef.flatten(1)).any():
            assert x.entropy is not None
            ascent = ascent - coef[..., None] * p * (all_logp + x.entropy[..., None])
        gradients = clip_norms(self.policy.backward(-ascent / tokens))
        if self.probe:
            self.probe.before_update(Update(x, pull, p, all_logp, gradients))
        self.optimizer.step(gradients)
        if self.probe:
            self.probe.after_update()
        return {
            "clip_low": low.float().mean(1),
            "clip_high": high.float().mean(1),
            "kl": (x.old_logp - logp).mean(1),
        }


def _per_token(losses: list[tuple[Loss, Tensor]], x: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(F A with F the gradient weight, clipped below, clipped above), (S, N) each."""
    pull, low, high = torch.empty_like(x.logp), torch.empty_like(x.mask), torch.empty_like(x.mask)
    ratio = (x.logp - x.old_logp).clamp(max=40.0).exp()
    for loss, of in [each for pair in losses for each in _fitted(*pair, ratio, x.advantages)]:
        names = ("logp", "old_logp", "advantages", "mask", "seq_ids", "entropy", "old_entropy")
        part = LossInputs(*(getattr(x, name)[of].flatten() for name in names))
        out = loss(part)
        pull[of] = out.gradient.view(len(of), -1)
        low[of] = (out.below & (part.advantages < 0)).view(len(of), -1)
        high[of] = (out.above & (part.advantages > 0)).view(len(of), -1)
    return pull, low, high


def _fitted(loss: Loss, of: Tensor, ratio: Tensor, advantages: Tensor) -> Iterator[tuple[Loss, Tensor]]:
    """Yield the loss, or one loss per seed if its parameters are fitted to the mini-batch."""
    if not loss.fits:
        yield loss, of
        return
    for seed in of:
        yield loss.fit(ratio[seed], advantages[seed]), seed[None]


def _context_statistics(logp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """H, sum p^2 and sum p^2 log p of every context, (S, K) each."""
    p = logp.exp()
    return entropy(logp), p.square().sum(-1), (p.square() * logp).sum(-1)


def clip_norms(gradients: list[Tensor]) -> list[Tensor]:
    """Clip the gradient of each seed, over all parameters, to norm `MAX_GRAD_NORM`."""
    norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    scale = (MAX_GRAD_NORM / norm.clamp(min=1e-12)).clamp(max=1.0)
    return [g * scale.view(-1, *[1] * (g.dim() - 1)) for g in gradients]


class _Optimizer:
    """Adam or SGD on stacked parameters. Steps are elementwise, so seeds stay independent."""

    def __init__(self, parameters: list[Tensor], setting: Setting) -> None:
        self.parameters, self._beta2 = parameters, setting.betas[1]
        self._torch: torch.optim.Optimizer
        if setting.optimizer == "sgd":
            self._torch = torch.optim.SGD(parameters, lr=setting.lr, fused=True)
        else:
            self._torch = torch.optim.Adam(
                parameters,
                lr=setting.lr,
                betas=setting.betas,
                eps=setting.eps,
                amsgrad=setting.optimizer == "amsgrad",
                fused=True,
            )

    def step(self, gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self._torch.step()

    def second_moments(self, gradients: list[Tensor]) -> list[Tensor] | None:
        """Adam's bias-corrected second moments after an update with these gradients; None for SGD."""
        if not isinstance(self._torch, torch.optim.Adam):
            return None
        moments = []
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            state = self._torch.state.get(parameter, {})
            step, old = float(state.get("step", 0.0)) + 1, state.get("exp_avg_sq", torch.zeros_like(gradient))
            new = self._beta2 * old + (1 - self._beta2) * gradient.square()
            moments.append(torch.maximum(new, state.get("max_exp_avg_sq", new)) / (1 - self._beta2**step))
        return moments
