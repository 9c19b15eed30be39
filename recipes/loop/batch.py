"""Training input from samples: the flat batch, token selection, mini-batches, aggregation weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from configs.schema import Config
from megatron_ext.learner.learner import Learner
from megatron_ext.learner.step import TrainBatch
from megatron_ext.rl import mismatch
from megatron_ext.rl.aggregation import sequence_weights
from megatron_ext.rl.losses import Loss
from megatron_ext.rl.schedules import Controller
from megatron_ext.rl.selection import Selection, SelectionInputs
from megatron_ext.rl.types import Sample, TokenStats
from recipes.loop.metrics import StepMetrics


def make_batch(config: Config, samples: list[Sample]) -> tuple[TrainBatch, torch.Tensor, torch.Tensor]:
    """The flat batch, the group of each sample, and which samples are trained at all."""
    lengths = torch.tensor([len(s.rollout.response_ids) for s in samples])
    truncated = torch.tensor([s.rollout.finish_reason == "length" for s in samples])
    include_B = ~truncated if config.advantage.overlong == "filter" else torch.ones_like(truncated)
    mask = torch.repeat_interleave(include_B, lengths)
    zeros = torch.zeros(int(lengths.sum()))
    experts = [] if config.rollout.routing_replay is False else [s.rollout.experts for s in samples]
    known = [chosen for chosen in experts if chosen is not None]
    if config.rollout.routing_replay and len(known) < len(samples):
        raise ValueError(
            "rollout.routing_replay=true: the rollouts hold no experts (an engine that does not return them, or a "
            "journal written without them); set rollout.routing_replay=null"
        )
    batch = TrainBatch(
        prompts=[s.rollout.prompt_ids for s in samples],
        responses=[s.rollout.response_ids for s in samples],
        old_logp=zeros,
        advantages=zeros,
        mask=mask,
        keep=mask,
        kl_coef=zeros,
        entropy_coef=zeros,
        is_weight=torch.ones_like(zeros),
        experts=known if known and len(known) == len(samples) else None,
    )
    return batch, torch.tensor([s.group for s in samples]), include_B


def needs_statistics(config: Config, controller: Controller, step: int) -> bool:
    """Whether a step needs the pass over the batch before its first update.

    With ``train.old_logprobs=rollout`` the loss needs none. Others may: a selection, a schedule or loss that follows
    the entropy, the entropy probe; and the first step, which compares rollout with learner.
    """
    train = config.train
    probed = train.entropy_probe_every > 0 and (step + 1) % train.entropy_probe_every == 0
    selects = config.selection["name"] != "none"
    return train.old_logprobs == "learner" or step == 0 or selects or controller.reads_entropy or probed


def describe_old_policy(
    config: Config,
    batch: TrainBatch,
    stats: TokenStats | None,
    rollout_logp_T: torch.Tensor,
    samples: list[Sample],
    step: int,
    metrics: StepMetrics,
) -> float:
    """Write the policy before the first update into the batch, and how far it is from the engine; its mean entropy.

    Without ``stats`` (see `needs_statistics`) that is the engine's log-probabilities, and 0 stands for the entropy.
    """
    batch.old_logp = rollout_logp_T
    if stats is None:
        return 0.0
    batch.old_entropy = stats.entropy
    if config.train.old_logprobs == "learner":
        batch.old_logp = stats.logp
    correct_mismatch(config, batch, stats, rollout_logp_T, metrics)
    # A replay may follow other settings, and then its later weights are not those that wrote the rollouts.
    limit = config.rollout.agreement_limit if step == 0 or config.rollout.replay is None else float("inf")
    metrics.agreement(samples, rollout_logp_T, stats, version=step, limit=limit)
    metrics.statistics(stats, batch.seq_ids)
    return float(stats.entropy.double().mean())


def correct_mismatch(
    config: Config, batch: TrainBatch, stats: TokenStats, rollout_logp_T: torch.Tensor, metrics: StepMetrics
) -> None:
    """Weights against the engine's probabilities, written into the batch; dropped tokens leave its mask."""
    train = config.train
    correction = mismatch.correct(
        stats.logp,
        rollout_logp_T,
        batch.seq_ids,
        batch.mask,
        high=train.tis_cap,
        low=train.tis_floor,
        level=train.tis_level,
        mode=train.tis_mode,
        veto=train.tis_veto,
    )
    batch.is_weight, batch.mask = correction.weight, correction.keep
    metrics.add(correction.metrics)


def select(
    config: Config,
    selection: Selection,
    batch: TrainBatch,
    stats: TokenStats | None,
    step: int,
    samples: Sequence[int],
    metrics: StepMetrics,
    entropy_coef: float = 0.0,
) -> None:
    """Token selection over ``samples``, written into the batch. The whole batch is here, so nothing is reduced.

    ``entropy_coef`` is added to the selection's own, on all tokens: a schedule moves it. Without ``stats`` there is no
    selection (see `needs_statistics`).
    """
    if stats is None:
        batch.keep, batch.entropy_coef = batch.mask, entropy_coef * batch.mask
        return
    chosen = torch.isin(batch.seq_ids, torch.tensor(list(samples)))
    first_seq_id = step * config.rollout.prompts_per_step * config.rollout.n
    out = selection.select(
        SelectionInputs(
            stats=TokenStats(*(x[chosen] for x in (stats.logp, stats.entropy, stats.sum_p2, stats.sum_p2_logp))),
            advantages=batch.advantages[chosen],
            mask=batch.mask[chosen],
            seq_ids=batch.seq_ids[chosen] + first_seq_id,
            positions=(torch.arange(len(batch.seq_ids)) - batch.offsets[batch.seq_ids])[chosen],
            seed=config.seed,
            step=step,
            old_logp=batch.old_logp[chosen] if selection.per_update else None,
        )
    )
    batch.keep, batch.kl_coef, batch.entropy_coef = (
        old.clone().masked_scatter(chosen, new.to(old.dtype))
        for old, new in (
            (batch.keep, out.keep),
            (batch.kl_coef, out.kl_coef),
            (batch.entropy_coef, out.entropy_coef + entropy_coef * batch.mask[chosen]),
        )
    )
    if out.weight is not None:
        weight = torch.ones_like(batch.advantages) if batch.token_weight is None else batch.token_weight.clone()
        batch.token_weight = weight.masked_scatter(chosen, out.weight.to(weight.dtype))
    metrics.add({name: float(value) for name, value in out.metrics.items()})


def split(groups_B: torch.Tensor, prompts: int) -> list[list[int]]:
    """Sample indices of each mini-batch: all samples of ``prompts`` groups, groups in order of appearance.

    A short batch gives fewer mini-batches, of which the last may have fewer groups. No group is cut.
    """
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups_B.tolist()):
        members.setdefault(group, []).append(index)
    groups = list(members.values())
    return [sum(groups[start : start + prompts], []) for start in range(0, len(groups), prompts)]


def fit_loss(loss: Loss, learner: Learner, batch: TrainBatch, mini: Sequence[int]) -> Loss:
    """The loss fitted to a mini-batch under the current weights, with one forward pass; the same on every rank."""
    chosen = torch.isin(batch.seq_ids, torch.tensor(list(mini))) & batch.mask
    ratio = (learner.statistics(batch, mini).logp[chosen] - batch.old_logp[chosen]).exp()
    return loss.fit(ratio, batch.advantages[chosen])


def positive_nll_weights(
    coef: float, samples: Sequence[Sample], batch: TrainBatch, mini: Sequence[int]
) -> torch.Tensor:
    """(T,) weight of -logp in the objective of a mini-batch: coef / (tokens of its correct samples) on those tokens."""
    correct_B = torch.zeros(len(samples), dtype=torch.bool)
    correct_B[[i for i in mini if samples[i].correct]] = True
    chosen_T = correct_B[batch.seq_ids] & batch.mask
    return coef * chosen_T.to(batch.old_logp.dtype) / chosen_T.sum().clamp(min=1)


def aggregation_weights(
    config: Config,
    selection: Selection,
    batch: TrainBatch,
    groups_B: torch.Tensor,
    include_B: torch.Tensor,
    mini: Sequence[int],
) -> torch.Tensor:
    """(B,) float64 weight of each sample's tokens, with the denominator of the whole mini-batch; 0 outside it."""
    counts = batch.keep if selection.renormalise else batch.mask
    lengths_B = torch.zeros(len(groups_B), dtype=torch.long).index_add_(0, batch.seq_ids, counts.long())
    index = torch.tensor(list(mini))
    weights_B = torch.zeros(len(groups_B), dtype=torch.float64)
    weights_B[index] = sequence_weights(
        config.advantage.aggregation,
        lengths_B[index],
        groups_B[index],
        max_tokens=config.rollout.max_tokens,
        include_B=include_B[index],
    )
    return weights_B
