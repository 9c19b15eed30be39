"""Train a policy: `python -m recipes.train recipe=quickstart loss=dapo optim.lr=1e-6`.

The loop, top to bottom: push weights -> collect rollouts -> rewards -> statistics -> advantages -> selection ->
optimizer steps -> evaluate -> save. Every rank runs it. Only rank 0 talks to rollout engines and reward workers, and it
sends the results to the other ranks as one journal record, without the token ids that a rank does not train. Everything
else is a function of that record, the configuration and the weights, so a run is repeatable from its journal.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.layout import updates_per_epoch
from configs.schema import Config
from megatron_ext import progress
from megatron_ext.learner import checkpoint
from megatron_ext.learner.critic import Critic
from megatron_ext.learner.learner import Learner
from megatron_ext.learner.model import distributed
from megatron_ext.learner.resume import resume
from megatron_ext.learner.step import TrainBatch
from megatron_ext.rl.losses import Loss, build_loss
from megatron_ext.rl.schedules import Controller, build_controller
from megatron_ext.rl.selection import Selection, build_selection
from megatron_ext.rl.types import Sample
from recipes.data.evalsets import due_sets
from recipes.launch import launch
from recipes.loop.advantages import assign_advantages, update_critic
from recipes.loop.batch import (
    aggregation_weights,
    describe_old_policy,
    fit_loss,
    make_batch,
    needs_statistics,
    positive_nll_weights,
    select,
    split,
)
from recipes.loop.metrics import StepMetrics
from recipes.loop.nonfinite import Guard
from recipes.loop.profile import check_profile, profiled
from recipes.loop.run_dir import RunDir
from recipes.loop.samples import make_trace
from recipes.loop.stop import StopSignal
from recipes.loop.stream import RolloutStream


def train(config: Config, model_dir: Path) -> None:
    """One run, from its last checkpoint (or the beginning) to its last step, on every rank."""
    torch.set_num_threads(config.train.threads)
    controller = build_controller(config.loss["name"], config.loss, config.schedule["name"], **_params(config.schedule))
    selection = build_selection(**config.selection)
    per_step = config.train.epochs * updates_per_epoch(config)
    critic: Critic | None = None
    policy_steps = config.train.steps
    limit_s = config.run.collective_timeout_s
    with distributed(config.parallel, config.seed, timeout_s=limit_s), RunDir(config) as run:
        if config.advantage.name == "gae":
            critic = Critic(config, model_dir, total_updates=config.train.steps * per_step)
            policy_steps -= config.critic.warmup_steps
        learner = Learner(config, model_dir, total_updates=policy_steps * per_step)
        state: dict[str, Any] = {"step": 0, "position": 0, "controller": controller.init()}
        progress.at("load")
        state = resume(learner, run.checkpoints, config.resume.checkpoint, critic=critic) or state
        keep, background = config.train.keep_checkpoints, config.train.async_save
        saver = checkpoint.Saver(run.checkpoints, keep=keep, background=background)
        run.begin(state["step"], learner.hf.vocab_size)
        guard, rank = Guard(config, run.path), torch.distributed.get_rank()
        check_profile(config, rank, torch.distributed.get_world_size())
        stop = StopSignal(run.stop_file, run.say)
        with RolloutStream(config, model_dir, run.path, learner, critic) as stream:
            if state["step"] == 0:
                run.evaluated(stream.evaluate(0), before=True)
            metrics = StepMetrics(state["step"] + 1)
            one_step = partial(train_step, config, learner, critic, controller, selection, guard)
            for step in range(state["step"], config.train.steps):
                record, samples = stream.next(step, state["position"], metrics)
                with profiled(config, rank, step):
                    state["controller"] = one_step(state["controller"], step, samples, metrics)
                metrics.learner(learner, critic)
                state |= {"step": step + 1, "position": record["position"]}
                last = step + 1 == config.train.steps
                if due_sets(config, step + 1):
                    with metrics.clock("eval"):
                        run.evaluated(values := stream.evaluate(step + 1))
                        state |= run.keep_best(learner, model_dir, values, step + 1, state.get("best"))
                stopping = stream.agree(stop.requested or bool(run.watch.stalled))
                # Before the checkpoint: if killed in between, the step is repeated, and its line is not lost.
                run.log(metrics, samples, record)
                metrics = StepMetrics(step + 2)  # the next line gets the time of saving
                if last or stopping or (config.train.save_every and (step + 1) % config.train.save_every == 0):
                    with metrics.clock("save"):
                        saver.save(learner, step + 1, {**state}, critic=critic)
                        if last or stopping:
                            saver.wait()
                metrics.add(saver.report())
                if stopping and not last:
                    run.stopped(step + 1)
                    return
            run.finish(learner, model_dir)


def train_step(
    config: Config,
    learner: Learner,
    critic: Critic | None,
    controller: Controller,
    selection: Selection,
    guard: Guard,
    controller_state: dict[str, Any],
    step: int,
    samples: list[Sample],
    metrics: StepMetrics,
) -> dict[str, Any]:
    """All optimizer steps on one batch of rollouts; returns the controller's next state.

    Writes advantages into ``samples``. Without samples (dynamic sampling found no group with a signal) nothing is
    updated. In the first ``critic.warmup_steps`` steps only the critic, if there is one, is updated.
    """
    metrics.rollouts(samples)
    if not samples:
        return controller_state
    with metrics.clock("statistics"):
        batch, groups_B, include_B = make_batch(config, samples)
        stats = learner.statistics(batch) if needs_statistics(config, controller, step) else None
        batch.trace = make_trace(samples)
        batch.ref_logp = learner.reference_logp(batch)
    rollout_logp = torch.cat([torch.as_tensor(s.rollout.logprobs, dtype=learner.dtype) for s in samples])
    if not guard.accepts(step, samples, rollout_logp, stats):
        metrics.add({"actor/nonfinite_updates": guard.skipped})
        return controller_state
    entropy = describe_old_policy(config, batch, stats, rollout_logp, samples, step, metrics)
    loss, controller_state = scheduled_loss(config, controller, controller_state, step, entropy, metrics)
    targets = assign_advantages(
        config, selection, samples, rollout_logp if stats is None else stats.logp, batch, critic, metrics
    )
    bonus = controller.entropy_coef(controller_state, step=step)
    select(config, selection, batch, stats, step, range(len(samples)), metrics, bonus)
    with metrics.clock("update"):
        for _ in range(config.train.epochs):
            for mini in split(groups_B, config.train.mini_batch_prompts):
                if selection.per_update:
                    select(config, selection, batch, learner.statistics(batch, mini), step, mini, metrics, bonus)
                members = [samples[i] for i in mini]
                weights_B = aggregation_weights(config, selection, batch, groups_B, include_B, mini)
                if config.train.positive_nll_coef:
                    batch.nll_weight = positive_nll_weights(config.train.positive_nll_coef, samples, batch, mini)
                fitted = fit_loss(loss, learner, batch, mini) if loss.fits else loss
                if critic is not None and targets is not None:
                    done = guard.update(step, members, partial(update_critic, critic, targets, batch, mini))
                    if done is not None:
                        metrics.critic_update(done)
                    if step < config.critic.warmup_steps:
                        continue
                step_on = partial(learner.update, batch, mini, weights_B, fitted, selection_inside=selection.inside)
                if (update := guard.update(step, members, step_on)) is not None:
                    metrics.update(update)
    metrics.add({"actor/nonfinite_updates": guard.skipped} if guard.skipped else {})
    describe_updates(config, learner, batch, entropy, step, metrics)
    return controller_state


def describe_updates(
    config: Config, learner: Learner, batch: TrainBatch, entropy: float, step: int, metrics: StepMetrics
) -> None:
    """Add the trace of every token, the predicted change of entropy and, where due, the measured one.

    ``entropy``: of the batch before its first update, nats per token.
    """
    assert batch.trace is not None
    learner.gather_trace(batch.trace)
    metrics.trace = batch.trace
    metrics.add({f"theory/{name}": value for name, value in metrics.theory().items()})
    if config.train.entropy_probe_every and (step + 1) % config.train.entropy_probe_every == 0:
        with metrics.clock("probe"):
            after = float(learner.statistics(batch).entropy.double().mean())
            metrics.add({"theory/entropy_change_same_tokens": after - entropy})


def scheduled_loss(
    config: Config, controller: Controller, state: dict[str, Any], step: int, entropy: float, metrics: StepMetrics
) -> tuple[Loss, dict[str, Any]]:
    """The loss with the controller's parameters at this step, and the controller's next state.

    ``entropy``: of the batch before its first update, nats per token.
    """
    total = config.train.steps
    state = controller.observe(state, step=step, total_steps=total, entropy=entropy)
    overrides = controller.loss_params(state, step=step, total_steps=total)
    metrics.add(controller.metrics(state))
    if (warning := controller.warning(state)) and torch.distributed.get_rank() == 0:
        print(f"step {step + 1}: {warning}", flush=True)
    return build_loss(config.loss["name"], **{**_params(config.loss), **overrides}), state


def _params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "name"}


if __name__ == "__main__":
    sys.exit(launch(train))
