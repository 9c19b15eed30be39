"""One pass of Megatron's schedule over packed micro-batches: the statistics pass and the training pass.

Shapes: T response tokens of the whole batch in *sample order* (sample 0's first), R response tokens of one
micro-batch in packed order, M tokens of a packed micro-batch, padding included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from configs.schema import ReferenceConfig
from megatron_ext.kernels import VocabShard, linear_vocab_statistics
from megatron_ext.learner import context_parallel, routing
from megatron_ext.learner.attention import packed_sequences
from megatron_ext.learner.policy_head import output_weight
from megatron_ext.rl import packing
from megatron_ext.rl.diagnostics import diagnostic_sums
from megatron_ext.rl.objective import Coefficients, Objective, PolicyLoss, evaluate
from megatron_ext.rl.trace import TokenTrace
from megatron_ext.rl.types import LossInputs, TokenStats


@dataclass(slots=True)
class TrainBatch:
    """A rollout batch on every rank: token ids per sample and flat per-token tensors of shape (T,).

    A rank needs the token ids of the samples that it computes (`Trainable.shares`); those of others may be `absent`.
    """

    prompts: Sequence[list[int] | Tensor]  # a list, or int tensors of one dimension
    responses: Sequence[list[int] | Tensor]
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor  # bool: False for tokens of filtered samples
    keep: Tensor  # bool: False where token selection switches the policy loss off
    kl_coef: Tensor  # coefficient of |logp - old_logp|
    entropy_coef: Tensor  # coefficient of -H
    is_weight: Tensor  # importance weight that corrects rollout-learner mismatch, 1 when off
    ref_logp: Tensor | None = None  # log p under the reference policy, when there is one
    old_entropy: Tensor | None = None  # of the weights before the first update, for selections by the entropy ratio
    nll_weight: Tensor | None = None  # coefficient of -logp with its own denominator, when there is such a term
    # Of each sample (fed tokens, layers with experts, top k), the experts to route to; None: the router chooses
    experts: Sequence[Tensor] | None = None
    token_weight: Tensor | None = None  # >= 0, factor on the policy loss, when the selection weighs tokens
    trace: TokenTrace | None = None  # updates write into it what they did to the tokens that a report shows
    seq_ids: Tensor = field(init=False)  # int64, index of the token's sample
    offsets: Tensor = field(init=False)  # (samples + 1,) int64: start of each sample in the flat tensors, and T

    def __post_init__(self) -> None:
        lengths = [len(r) for r in self.responses]
        self.offsets = packing.response_offsets(lengths)
        self.seq_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))


@dataclass(slots=True)
class MicroBatch:
    """One micro-batch on this rank: packed tokens, and the flat indices (R,) of its response tokens.

    Under context parallelism this rank runs the model over a part of the tokens; all other fields describe the whole
    micro-batch.
    """

    packed: packing.PackedBatch
    flat_R: Tensor
    local_M: Tensor  # int64, the tokens of the row that this rank runs the model over, in this order
    gathered_R: Tensor  # int64, where the response tokens are in what `context_parallel.gather_tokens` returns
    weight_R: Tensor | None = None  # aggregation weights, float64
    counts_divisor: bool = False  # see training_step
    experts_M: Tensor | None = None  # `routing.local_experts`, for a replay of the engine's routing


def make_micro_batch(
    batch: TrainBatch, samples: Sequence[int], weights_B: Tensor | None, *, pad_to: int = 1, pad_sequences_to: int = 1
) -> MicroBatch:
    """Pack ``samples`` (indices into the batch); ``weights_B`` (float64, all samples) are the aggregation weights."""
    pairs = [(_as_list(batch.prompts[i]), _as_list(batch.responses[i])) for i in samples]
    packed = packing.collate(pairs, pad_to_multiple=pad_to, pad_sequences_to=pad_sequences_to)
    flat_R = packing.response_slots(packed, samples, batch.offsets)
    return MicroBatch(
        packed,
        flat_R,
        context_parallel.local_tokens(packed.cu_seqlens),
        context_parallel.gathered_order(packed.cu_seqlens)[packed.response_mask_M],
        None if weights_B is None else weights_B[batch.seq_ids[flat_R]],
    )


ABSENT = -1  # no token's id


def absent(length: int) -> Tensor:
    """Stands for the token ids of a sample that another rank computes: the length without the memory."""
    return torch.tensor([ABSENT], dtype=torch.int32).expand(length)


def _as_list(ids: list[int] | Tensor) -> list[int]:
    if not isinstance(ids, Tensor):
        return ids
    assert not len(ids) or int(ids[0]) != ABSENT, "a pass over samples whose token ids this rank was not sent"
    return ids.tolist()


def forward(model: Any, mb: MicroBatch, device: torch.device) -> Tensor:
    """The model on a packed micro-batch: (1, local tokens, ...) on the last pipeline stage, hidden states on others."""
    packed, local_M = mb.packed, mb.local_M
    routing.begin(model, mb.experts_M, device)
    in_its_precision = {"fp32_output": False} if model.config.bf16 else {}
    return model(
        input_ids=packed.tokens_M[local_M][None].to(device),
        position_ids=packed.position_ids_M[local_M][None].to(device),
        attention_mask=None,
        packed_seq_params=packed_sequences(packed.cu_seqlens.to(device), packed.max_seqlen),
        **in_its_precision,
    )


@dataclass(frozen=True, slots=True)
class Head:
    """Settings of the vocabulary statistics on this rank; see `megatron_ext.kernels.linear_vocab_statistics`."""

    shard: VocabShard | None = None  # this rank's slice of the vocabulary; None: all of it
    chunk_tokens: int = 0
    keep_bytes: int = 0


def _statistics(hidden: Tensor, model: Any, mb: MicroBatch, head: Head) -> TokenStats:
    """Vocabulary statistics of the response tokens only: the prompt's logits are never made, the others in chunks.

    (R,) of the whole micro-batch, although this rank has the hidden states (1, local tokens, h) of its own tokens only.
    """
    places = local_responses(mb)
    targets = mb.packed.targets_M[mb.local_M[places]].to(hidden.device)
    stats = linear_vocab_statistics(
        hidden[0].index_select(0, places.to(hidden.device)),
        output_weight(model),
        targets,
        shard=head.shard,
        chunk_tokens=head.chunk_tokens,
        keep_bytes=head.keep_bytes,
    )
    rows = torch.stack([stats.logp, stats.entropy, stats.sum_p2, stats.sum_p2_logp], dim=1)
    logp, entropy, sum_p2, sum_p2_logp = whole_micro_batch(rows, places, mb).unbind(1)
    return TokenStats(logp, entropy, sum_p2.detach(), sum_p2_logp.detach())


def local_responses(mb: MicroBatch) -> Tensor:
    """Places of the response tokens among this rank's tokens, on the CPU: the host would wait for a mask on the GPU."""
    return mb.packed.response_mask_M[mb.local_M].nonzero()[:, 0]


def whole_micro_batch(rows: Tensor, places: Tensor, mb: MicroBatch) -> Tensor:
    """(R, k) in packed order, from the parts of all context-parallel ranks: ``rows`` at ``places``, see
    `local_responses`."""
    local = rows.new_zeros(len(mb.local_M), rows.shape[1]).index_copy(0, places.to(rows.device), rows)
    return context_parallel.gather_tokens(local)[mb.gathered_R.to(rows.device)]


def statistics_step(
    iterator: Iterator[MicroBatch], model: Any, *, device: torch.device, head: Head
) -> tuple[Tensor, Callable[..., Any]]:
    """Megatron ``forward_step_func`` of the statistics pass; yields (flat indices, (4, R)) per micro-batch."""
    mb = next(iterator)

    def collect(output: Tensor) -> tuple[Tensor, Tensor, Any]:
        stats = _statistics(output, model, mb, head)
        rows = torch.stack([stats.logp, stats.entropy, stats.sum_p2, stats.sum_p2_logp])
        return output.new_zeros(()), torch.zeros((), dtype=torch.int), (mb.flat_R, rows)

    return forward(model, mb, device), collect


def training_step(
    iterator: Iterator[MicroBatch],
    model: Any,
    *,
    batch: TrainBatch,
    loss: PolicyLoss,
    selection_inside: Callable[[LossInputs], Tensor] | None,
    device: torch.device,
    head: Head,
    reference: ReferenceConfig,
) -> tuple[Tensor, Callable[..., Any]]:
    """Megatron ``forward_step_func`` of an optimizer step.

    The objective is `megatron_ext.rl.objective.evaluate`, whose weight is the aggregation weight times the mismatch
    weight. All denominators are in the weights, so gradients only need to be summed. Megatron always divides by a
    global token count, in float32. We pass a count of exactly one (``MicroBatch.counts_divisor`` is True for one
    micro-batch of one rank), which costs no precision.
    """
    mb = next(iterator)

    def objective(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        stats = _statistics(output, model, mb, head)
        flat = mb.flat_R

        def at(x: Tensor) -> Tensor:
            value = x[flat].to(device)
            return value.to(stats.logp.dtype) if value.is_floating_point() else value

        inputs = LossInputs(
            logp=stats.logp,
            old_logp=at(batch.old_logp),
            advantages=at(batch.advantages),
            mask=at(batch.mask),
            seq_ids=at(batch.seq_ids),
            entropy=stats.entropy,
            old_entropy=None if batch.old_entropy is None else at(batch.old_entropy),
        )
        keep = at(batch.keep)
        if selection_inside is not None:
            keep = keep & selection_inside(inputs)
        assert mb.weight_R is not None
        coefficients = Coefficients(
            weight=mb.weight_R.to(stats.logp) * at(batch.is_weight),
            keep=keep,
            kl_coef=at(batch.kl_coef),
            entropy_coef=at(batch.entropy_coef),
            ref_logp=None if batch.ref_logp is None else at(batch.ref_logp),
            ref_coef=reference.kl_coef,
            ref_kl_type=reference.kl_type,
            nll_weight=None if batch.nll_weight is None else at(batch.nll_weight),
            loss_weight=None if batch.token_weight is None else at(batch.token_weight),
        )
        result = evaluate(loss, inputs, coefficients)
        if batch.trace is not None:
            factor = keep if coefficients.loss_weight is None else keep * coefficients.loss_weight
            batch.trace.add(flat, inputs, factor, result.outputs)
        divisor = torch.tensor(int(mb.counts_divisor), dtype=torch.int, device=device)
        return result.total, divisor, metric_sums(inputs, stats, result)

    return forward(model, mb, device), objective


DIAGNOSTIC = "diagnostic/"  # prefix of the sums that `diagnostics` takes


def metric_sums(inputs: LossInputs, stats: TokenStats, result: Objective) -> dict[str, Tensor]:
    """Additive float64 scalars: the loss's metrics times the token count, ``tokens``, ``entropy``, ``loss`` (the
    objective), ``pg_loss`` (the policy loss in it), and the sums that `megatron_ext.rl.diagnostics.diagnostics` takes.
    """
    count = inputs.mask.sum().double()
    sums = {name: value.detach().double() * count for name, value in result.outputs.metrics.items()}
    entropy = torch.where(inputs.mask, stats.entropy.detach().double(), 0.0).sum()
    sums |= {
        "tokens": count,
        "entropy": entropy,
        "loss": result.total.detach().double(),
        "pg_loss": result.policy.double(),
    }
    if result.kl_ref is not None:
        sums["kl_ref"] = result.kl_ref.sum().double()
    if torch.is_grad_enabled():
        diagnostic = diagnostic_sums(stats, inputs, result)
        sums |= {DIAGNOSTIC + name: value for name, value in diagnostic.items()}
    return sums
