"""The learner: Megatron model, optimizer and learning-rate schedule behind five methods.

``statistics`` (one pass over the batch), ``update`` (one optimizer step), ``export`` (weights under Hugging Face
names), ``save`` and ``load`` (in `checkpoint`). Every rank calls each method with the same arguments; the layout
decides which rank computes what, and every rank gets the same result. ``offload`` and ``reload`` free this rank's GPU
memory for the rollout engine in between.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

import conversion
from configs.layout import alignment
from configs.schema import Config
from megatron_ext import progress
from megatron_ext.flops import ForwardFlops
from megatron_ext.learner import control, routing, weights, work
from megatron_ext.learner import model as megatron
from megatron_ext.learner.model import parallel_state
from megatron_ext.learner.offload import Parking, drop_fp8_copies, model_tensors, optimizer_tensors
from megatron_ext.learner.policy_head import put_hidden_states
from megatron_ext.learner.reference import Reference
from megatron_ext.learner.step import (
    DIAGNOSTIC,
    Head,
    MicroBatch,
    TrainBatch,
    make_micro_batch,
    statistics_step,
    training_step,
)
from megatron_ext.learner.value_head import WEIGHT
from megatron_ext.learner.vocab_parallel import tensor_parallel_shard
from megatron_ext.learner.work import Work, WorkReport
from megatron_ext.rl import packing
from megatron_ext.rl.objective import PolicyLoss
from megatron_ext.rl.trace import TokenTrace
from megatron_ext.rl.types import LossInputs, TokenStats


@dataclass(frozen=True, slots=True)
class UpdateMetrics:
    """Metrics of one optimizer step, over the whole mini-batch."""

    means: dict[
        str, float
    ]  # over response tokens; `loss` (the objective), `pg_loss`, `grad_norm`, `lr`, `skipped_updates`
    diagnostic_sums: dict[str, float]  # for `megatron_ext.rl.diagnostics`, additive over updates
    tokens: float  # response tokens


class NotFinite(FloatingPointError):
    """A loss, gradient, reward or log-probability is not a finite number. Nothing was updated with it."""


class Trainable:
    """A Megatron model with its optimizer and learning-rate schedule, run over packed micro-batches."""

    most_padding = 0.02  # by which micro-batches may grow, as a share, so that pipeline stages need send no shapes
    replays_routing = False  # whether a batch's experts are routed to; see `routing`

    def __init__(self, config: Config, model_dir: Path, *, total_updates: int, value_head: bool = False) -> None:
        """Build the model of ``model_dir`` in the configured layout and load its weights.

        Raises ValueError for a checkpoint that does not fit its own config, or a layout that does not fit the model.
        """
        self.config = config
        self.model_dir = model_dir
        self.hf = conversion.read_config(model_dir)
        parallel, optim = config.parallel, config.optim
        self.chunks = megatron.build_chunks(
            self.hf,
            parallel,
            config.model,
            optim=optim,
            value_head=value_head,
        )
        weights.import_hf(self.hf, model_dir, self.chunks, skip=(WEIGHT,) if value_head else ())
        control.barrier()  # reading takes ranks of different nodes different times
        self.optimizer, self.lr_schedule = megatron.build_optimizer(
            optim, config.model.dtype, self.chunks, total_updates
        )
        self.device = megatron.device()
        self.dtype = torch.float64 if config.model.dtype == "float64" else torch.float32  # of per-token results
        self._last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self.replica = parallel_state.get_data_parallel_rank()  # which copy of the model this rank has a part of
        self._dp_size = parallel_state.get_data_parallel_world_size()
        self._reports = (
            self._last_stage
            and parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )
        self.work = Work(ForwardFlops(self.hf, outputs=1 if value_head else None))
        transformer = self.chunks[0].config  # of all chunks
        transformer.finalize_model_grads_func = partial(self._finalize, transformer.finalize_model_grads_func)
        self._packing = packing.PackingCost()
        self._state, self._weights = Parking(), Parking()  # what is on the host: optimizer state, weights
        self.rest()

    def offload(self, *, weights: bool = False) -> None:
        """Free the memory of optimizer state and gradient buffers, and with ``weights`` that of the weights too.

        State and weights are moved to host memory, gradients are dropped, so call it between updates. Local to this
        rank. A second call may add the weights; while they are offloaded only :meth:`reload` may be called.
        """
        if weights:
            self.settle()
        for chunk in self.chunks:
            chunk.offload_grad_buffers(empty_cache=False)
        self._state.park(optimizer_tensors(self.optimizer, self.chunks))
        if weights:
            self._weights.park(model_tensors(self.chunks))
            drop_fp8_copies(self.chunks)
        torch.cuda.empty_cache()  # so that another process on this GPU can have it

    def reload(self, *, optimizer: bool | None = None) -> None:
        """Undo :meth:`offload`, bit for bit; does nothing when nothing is offloaded. Local to this rank.

        ``optimizer``: its state too; by default unless ``optim.offload`` keeps it on the host. An update restores the
        state and gradient buffers that it needs by itself.
        """
        self._weights.unpark()
        if optimizer or (optimizer is None and not self.config.optim.offload):
            self._state.unpark()

    def settle(self) -> None:
        """Gather weights that an optimizer step has left on their ranks: before anything but a forward pass reads them.

        A forward pass gathers them itself under ``optim.overlap_param_gather``; without it they are never left.
        A collective of all data-parallel ranks.
        """
        if self.config.optim.overlap_param_gather:
            for chunk in self.chunks:
                for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                    if group.param_gather_handle is not None or not group.param_gather_dispatched:
                        group.start_param_sync(force_sync=True)

    def rest(self) -> None:
        """Offload as ``optim.offload`` requires between optimizer steps."""
        if self.config.optim.offload:
            self.offload()

    def _forward_pass(
        self, batch: TrainBatch, samples: Sequence[int], step: Callable[..., Any], *, rows: int
    ) -> Tensor:
        """(rows, T) on every rank, on the CPU: what ``step`` collects as (flat indices, (rows, R) values); 0 elsewhere.

        T counts the response tokens of the whole batch.
        """
        collected = self._run(batch, samples, None, step, forward_only=True)
        flat = torch.zeros(rows, int(batch.offsets[-1]), dtype=self.dtype, device=self.device)
        if self._reports:
            for flat_R, values in collected:
                flat[:, flat_R.to(self.device)] = values.to(self.dtype)
        # Every token is filled in by exactly one rank, so this sum is a gather and exact.
        torch.distributed.all_reduce(flat)
        return flat.cpu()

    def _optimize(
        self, batch: TrainBatch, samples: Sequence[int], weights_B: Tensor, step: Callable[..., Any]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """One optimizer step. Returns the sums that ``step`` collected, over all micro-batches and ranks, and
        ``grad_norm``, ``skipped_updates`` and ``lr``; the same on every rank. NotFinite leaves the weights alone.
        """
        for chunk in self.chunks:
            chunk.restore_grad_buffers()
        if self.config.model.fp8 and self.config.model.fp8_recipe == "delayed" and self.lr_schedule.num_steps == 0:
            # Delayed scaling has no scale for gradients before the first backward pass, and they would vanish in FP8.
            self._zero_gradients()
            self._run(replace(batch, trace=None), samples, weights_B, step, forward_only=False)
        self._zero_gradients()
        collected = self._run(batch, samples, weights_B, step, forward_only=False)
        sums = self._reduce_sums(collected)
        try:
            self._require_finite(sums)
        except NotFinite:
            self.rest()
            raise
        self._state.unpark()
        with megatron.on_device():
            successful, grad_norm, _ = self.optimizer.step()
            self.lr_schedule.step(increment=1)
        self.rest()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient norm is {grad_norm}: nothing after the last checkpoint is usable")
        about = {
            "grad_norm": float(grad_norm),
            "skipped_updates": float(not successful),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
        }
        return sums, about

    def _zero_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _require_finite(self, sums: dict[str, float]) -> None:
        """NotFinite, on every rank, when the loss or any gradient is not finite: before the optimizer touches weights.

        Megatron has no such check without a loss scaler.
        """
        for name in ("pg_loss", "loss", "value_loss"):  # a policy sums the first two, a critic the last
            if not math.isfinite(sums.get(name, 0.0)):
                raise NotFinite(f"loss {sums[name]}")
        finite = torch.ones(1, device=self.device)
        for chunk in self.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                if buffer.grad_data.numel():  # the largest is read off in one pass that allocates nothing
                    finite *= torch.isfinite(torch.linalg.vector_norm(buffer.grad_data, torch.inf))
        torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if not bool(finite):
            raise NotFinite("gradient")

    def _run(
        self,
        batch: TrainBatch,
        samples: Sequence[int],
        weights_B: Tensor | None,
        step: Callable[..., Any],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Plan and pack micro-batches and run them through Megatron's schedule; returns the last stage's results."""
        micro_batches: list[MicroBatch] = []
        planned = self._plan(batch, samples)
        pad_to = self._padding([[self._fed_length(batch, samples[i]) for i in members] for members in planned])
        for number, members in enumerate(planned):
            mb = make_micro_batch(
                batch,
                [samples[i] for i in members],
                weights_B,
                pad_to=pad_to,
                pad_sequences_to=sequence_multiple(self.config),
            )
            if batch.experts is not None and self.replays_routing:
                own = [batch.experts[samples[i]] for i in members]
                mb.experts_M = routing.local_experts(own, mb.packed, mb.local_M, self.hf, sp=self.config.parallel.sp)
            mb.counts_divisor = number == 0 and self.replica == 0 and parallel_state.get_context_parallel_rank() == 0
            micro_batches.append(mb)
        for chunk in self.chunks:
            chunk.train(not forward_only)
        schedule = get_forward_backward_func()
        iterators = [iter(micro_batches) for _ in self.chunks]
        fed = ((self._fed_length(batch, i), len(batch.responses[i])) for i in samples)
        self.work.begin(fed, sum(len(mb.local_M) for mb in micro_batches), forward_only=forward_only)
        with megatron.on_device():
            collected: list[Any] = schedule(
                forward_step_func=_noting_progress(step, len(micro_batches)),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(micro_batches),
                seq_length=max(len(mb.packed.tokens_M) for mb in micro_batches),
                micro_batch_size=1,
                forward_only=forward_only,
            )
        routing.clear(self.chunks)
        if forward_only:
            self.work.end()
        return collected

    def _finalize(self, finalize: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Called by Megatron after the last micro-batch. It reduces gradients, so ranks wait for each other from
        here."""
        self.work.end()
        finalize(*args, **kwargs)

    def _plan(self, batch: TrainBatch, samples: Sequence[int]) -> list[list[int]]:
        """Places in ``samples`` by micro-batch of this data-parallel rank."""
        lengths = [self._fed_length(batch, i) for i in samples]
        multiple, cost = sequence_multiple(self.config), packing.attention_cost(self.hf.hidden_size)
        planned = self._plan_all(lengths)
        self._packing += packing.packing_cost(
            planned, lengths, pad_to_multiple=token_multiple(self.config), pad_sequences_to=multiple, cost=cost
        )
        return planned[self.replica]

    def _plan_all(self, lengths: Sequence[int]) -> list[list[list[int]]]:
        """Places in ``lengths``, the fed tokens of each sample, by data-parallel rank and micro-batch."""
        parallel, multiple = self.config.parallel, sequence_multiple(self.config)
        return packing.plan(
            [packing.padded_length(n, multiple) for n in lengths],
            dp_size=self._dp_size,
            token_budget=self.config.train.micro_batch_tokens,
            micro_batch_multiple=parallel.pp if parallel.vpp > 1 else 1,
            cost=packing.attention_cost(self.hf.hidden_size),
        )

    def shares(self, lengths: Sequence[int], passes: Iterable[Sequence[int]]) -> list[list[int]]:
        """The samples that each data-parallel rank computes in any of the ``passes``: it needs no other token ids.

        ``lengths``: fed tokens of every sample of a batch; a pass goes over some samples, in this order. The same on
        every rank.
        """
        needed: list[set[int]] = [set() for _ in range(self._dp_size)]
        for samples in passes:
            for rank, micro_batches in enumerate(self._plan_all([lengths[i] for i in samples])):
                needed[rank].update(samples[place] for members in micro_batches for place in members)
        return [sorted(share) for share in needed]

    @staticmethod
    def _fed_length(batch: TrainBatch, sample: int) -> int:
        return packing.fed_length(len(batch.prompts[sample]), len(batch.responses[sample]))

    def _padding(self, lengths: Sequence[Sequence[int]]) -> int:
        """What the tokens of each micro-batch of a pass are padded to a multiple of; ``lengths`` by micro-batch.

        Between pipeline stages Megatron sends the shape of every tensor ahead, and the receiving host waits for it.
        Micro-batches of nearly one length are padded to the longest instead, and no shapes are sent.
        """
        multiple = token_multiple(self.config)
        if self.config.parallel.pp == 1:
            return multiple
        padded = [packing.packed_length(part, multiple, sequence_multiple(self.config)) for part in lengths]
        longest = max(padded)
        alike = longest * len(padded) <= (1 + self.most_padding) * sum(padded)
        self.chunks[0].config.variable_seq_lengths = not alike
        return longest if alike else multiple

    def packing_report(self) -> dict[str, float]:
        """The cost of packing since the last call, see `packing.PackingCost.report`."""
        report, self._packing = self._packing.report(), packing.PackingCost()
        return report

    def work_report(self, *others: Trainable) -> WorkReport:
        """Work of this and the other models since the last call. A collective of all ranks."""
        return work.report([model.work for model in (self, *others)], self.config, self.device)

    def _reduce_sums(self, collected: list[dict[str, Tensor]]) -> dict[str, float]:
        """Global sums from those that the last pipeline stage collected per micro-batch.

        Context-parallel ranks collect the same ones: each computes the loss of the whole micro-batch.
        """
        reduced: dict[str, float] = {}
        if self._last_stage:
            names = sorted(collected[0])
            total = torch.stack([torch.stack([sums[name].double() for name in names]) for sums in collected]).sum(0)
            torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
            reduced = dict(zip(names, total.tolist(), strict=True))
        last = torch.distributed.get_world_size() - 1
        result: dict[str, float] = json.loads(control.broadcast_bytes(json.dumps(reduced).encode(), src=last))
        return result


class Learner(Trainable):
    """A policy under training. Create inside :func:`megatron_ext.learner.model.distributed`."""

    def __init__(self, config: Config, model_dir: Path, *, total_updates: int) -> None:
        super().__init__(config, model_dir, total_updates=total_updates)
        put_hidden_states(self.chunks)
        self.replays_routing = self.hf.experts is not None
        if self.replays_routing:
            routing.install(self.chunks, self.hf)
        padded = conversion.padded_vocab(self.hf.vocab_size, config.parallel.tp)
        train = config.train
        self.head = Head(
            tensor_parallel_shard(self.hf.vocab_size, padded),
            chunk_tokens=train.loss_chunk_tokens,
            keep_bytes=int(train.keep_logits_gib * 2**30),
        )
        self.reference: Reference | None = None
        if config.reference.kl_coef:
            directory = Path(config.reference.path or model_dir)
            self.reference = Reference(self.hf, directory, self.chunks, self.statistics)

    @torch.no_grad()
    def statistics(self, batch: TrainBatch, samples: Sequence[int] | None = None) -> TokenStats:
        """Vocabulary statistics of every response token under the current weights, shape (T,), on every rank.

        With ``samples`` given only those are computed and the rest is 0.
        """
        samples = range(len(batch.responses)) if samples is None else samples
        return TokenStats(*self._forward_pass(batch, samples, self._statistics_step, rows=4).unbind())

    def update(
        self,
        batch: TrainBatch,
        samples: Sequence[int],
        weights_B: Tensor,
        loss: PolicyLoss,
        *,
        selection_inside: Callable[[LossInputs], Tensor] | None = None,
    ) -> UpdateMetrics:
        """One optimizer step on ``samples``; global metrics, the same on every rank.

        ``weights_B``: (B,) float64 aggregation weight of each sample of the batch, with the global denominator in it.
        """
        step = partial(self._training_step, batch=batch, loss=loss, selection_inside=selection_inside)
        totals, about = self._optimize(batch, samples, weights_B, step)
        tokens = totals.pop("tokens")
        objective = {k: totals.pop(k) for k in ("loss", "pg_loss")}
        sums = {k.removeprefix(DIAGNOSTIC): totals.pop(k) for k in list(totals) if k.startswith(DIAGNOSTIC)}
        means = {k: v / max(tokens, 1.0) for k, v in totals.items()} | objective | about
        return UpdateMetrics(means, sums, tokens)

    def gather_trace(self, trace: TokenTrace) -> None:
        """Add up, on every rank, what the updates of all ranks wrote into the trace of a batch. A collective."""
        sums = trace.sums.to(self.device) if self._reports else torch.zeros_like(trace.sums, device=self.device)
        torch.distributed.all_reduce(sums)
        trace.sums = sums.cpu()

    @torch.no_grad()
    def reference_logp(self, batch: TrainBatch) -> Tensor | None:
        """log p of every response token under the reference policy, (T,), on every rank; None when there is none."""
        if self.reference is None:
            return None
        self.settle()
        return self.reference.logp(batch)

    def export(self, *, explicit_lm_head: bool = False, spread: bool = False) -> Iterator[tuple[str, Tensor]]:
        """All weights under Hugging Face names, full, on rank 0; a collective that every rank must exhaust.

        With ``spread`` every tensor is on one of the ranks that hold it (`weights.export_hf`).
        """
        self.settle()
        return weights.export_hf(self.hf, self.chunks, explicit_lm_head=explicit_lm_head, spread=spread)

    def _statistics_step(self, iterator: Iterator[MicroBatch], model: Any) -> Any:
        return statistics_step(iterator, model, device=self.device, head=self.head)

    def _training_step(self, iterator: Iterator[MicroBatch], model: Any, **kwargs: Any) -> Any:
        reference = self.config.reference
        return training_step(iterator, model, device=self.device, head=self.head, reference=reference, **kwargs)


def _noting_progress(step: Callable[..., Any], total: int) -> Callable[..., Any]:
    """``step``, each call noted for the rank's heartbeat."""
    calls = itertools.count(1)

    def noted(*args: Any, **kwargs: Any) -> Any:
        progress.beat(f"micro-batch {next(calls)} of {total}")
        return step(*args, **kwargs)

    return noted


def sequence_multiple(config: Config) -> int:
    """The length of every packed sequence is a multiple of this: context parallelism splits it into 2 cp chunks."""
    return 2 * config.parallel.cp if config.parallel.cp > 1 else 1


def token_multiple(config: Config) -> int:
    """The number of tokens of a micro-batch is a multiple of this.

    Sequence parallelism splits the tokens of a context-parallel rank into tp equal parts, and each part must be a
    multiple of FP8's block.
    """
    parallel = config.parallel
    return parallel.cp * (parallel.tp if parallel.sp else 1) * alignment(config)
