"""Memory of a learner rank by formula: the parts of `recipes.plan`, checked against measurements.

What is kept between forward and backward was read off the graph that autograd records, tensor by tensor, for Megatron's
local layers as this project runs them; `benchmarks.learner_memory` compares the sums with measured peaks
(benchmarks/results/learner_memory_*.jsonl), and tests/distributed/test_learner_memory.py holds them together. For
Transformer Engine the inventory follows its sources and has not been measured by us.

Symbols: h hidden size; q, kv widths of all query, key heads; f width of the MLP (of a mixture of experts: of those that
a token visits, together); d channels of a head; b bytes of a number in the model's precision. All per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import conversion
from configs.layout import learner_processes, stage_layers
from configs.schema import Config, OptimConfig, ParallelConfig
from megatron_ext.kernels.linear_statistics import block_elements

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
MASK_ELEMENTS = 2**24  # of `megatron_ext.learner.attention`, whose import would load Megatron


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the learner rank that needs most."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # kept between forward and backward
    momentary: float  # on top of them: the loss, or one layer's backward, whichever needs more
    optimizer_elsewhere: bool = False  # its state is on the host while activations are there
    host: float = 0.0  # page-locked: offloaded state, the reference policy, all of it while colocated servers generate

    @property
    def total(self) -> float:
        """At the fuller of two moments: backward, and the optimizer step, when activations are gone."""
        step = self.activations + self.momentary
        if self.optimizer_elsewhere:
            return self.weights + self.gradients + max(step, self.optimizer)
        return self.weights + self.gradients + self.optimizer + step


def data_parallel(config: Config) -> int:
    """Data-parallel size: processes / (tp pp cp)."""
    p = config.parallel
    return learner_processes(config) // (p.tp * p.pp * p.cp)


def longest_sample(config: Config) -> int:
    """Tokens fed for the longest sample that can occur: P prompt and L response tokens are fed as P + L - 1."""
    rollout = config.rollout
    return min(config.data.max_prompt_tokens + rollout.max_tokens, rollout.max_model_len) - 1


def micro_batch(config: Config) -> int:
    """Tokens of the largest micro-batch: the budget, or one sample that exceeds it."""
    return max(config.train.micro_batch_tokens, longest_sample(config))


def layer_kind(config: Config) -> str:
    """Which layers the plan is about: those that ``auto`` takes on a GPU where Transformer Engine is installed."""
    chosen = config.model.transformer_impl
    if chosen == "auto":
        return "transformer_engine" if config.model.dtype == "bfloat16" else "local"
    return chosen


# ------------------------------------------------------------------------------------------------------- parameters


def parameter_count(hf: conversion.HFConfig) -> int:
    """Parameters of the whole model; a tied output layer counts once."""
    return sum(prod(shape) for shape in conversion.hf_shapes(hf).values())


def vocabulary_parameters(hf: conversion.HFConfig, parallel: ParallelConfig) -> int:
    """Of one rank's slice of an embedding or output layer, padded to a multiple of tp."""
    return conversion.padded_vocab(hf.vocab_size, parallel.tp) // parallel.tp * hf.hidden_size


def stage_parameters(hf: conversion.HFConfig, parallel: ParallelConfig) -> list[int]:
    """Parameters that one rank of each pipeline stage holds.

    Tensor parallelism cuts what `conversion.layout` says it cuts and repeats the norms. The embedding is on the first
    stage, the output layer on the last, which holds a copy of a tied embedding. Experts are spread over ep.
    """
    vocabulary = vocabulary_parameters(hf, parallel)
    layers = sum(_layer_parameters(hf, parallel))
    stages = [round(layers * share) for share in _stage_shares(hf, parallel)]
    stages[0] += vocabulary
    stages[-1] += hf.hidden_size + (0 if hf.tied and parallel.pp == 1 else vocabulary)  # the final norm, and the head
    return stages


def _stage_shares(hf: conversion.HFConfig, parallel: ParallelConfig) -> list[float]:
    """Of the layers, by pipeline rank."""
    return [number / hf.num_layers for number in stage_layers(parallel, hf.num_layers)]


def _layer_parameters(hf: conversion.HFConfig, parallel: ParallelConfig) -> tuple[float, float]:
    """Of all layers on one tensor- and expert-parallel rank: those that are no expert's, and the experts'."""
    shared = experts = 0.0
    for name in conversion.megatron_names(hf):
        if name.startswith("decoder.layers."):
            size = prod(conversion.megatron_shape(hf, name)) / (parallel.tp if conversion.layout(name) else 1)
            if ".local_experts." in name:
                experts += size / parallel.ep
            else:
                shared += size
    return shared, experts


def bytes_per_parameter(dtype: str, optim: OptimConfig, shards: int) -> tuple[float, float, float]:
    """(weights, gradients, optimizer state) in bytes per parameter.

    Source: Megatron-Core's guide to the distributed optimizer: bfloat16 with float32 gradients takes 18 bytes, or
    6 + 12/d with the state sharded over d ranks; float32 takes 16, or 8 + 8/d. The state is Adam's two moments, and
    float32 master weights under bfloat16. SGD (without momentum here) has no moments.

    Args:
        shards: d, data-parallel times context-parallel ranks (for experts divided by ep).
    """
    item = ITEM_BYTES[dtype]
    moments = 2 * max(item, 4) if optim.optimizer == "adam" else 0
    state = moments + (4 if dtype == "bfloat16" else 0)
    return item, max(item, 4), state / (shards if optim.distributed else 1)


# ------------------------------------------------------------------------------------------------------ activations


def layer_activations(config: Config, hf: conversion.HFConfig) -> float:
    """Bytes per token of one layer that are kept between forward and backward, on one rank.

    Local layers: per norm its input, the normalised input (both float32 at least) and the output: 2h (2 max(b, 4) + b);
    sines and cosines of both rotations 4d b; queries, keys, values and the attention's output, spread over padded
    batches (here without padding, which at worst doubles them), and the output gathered back: (3q + 2kv) b; 4 bytes per
    head for the softmax; gate and up together, silu(gate), up + 0, and the product: 5f b. Norms of queries and keys
    keep what comes out of the projection, a copy of the queries, and both normalised: 3 (q + kv) max(b, 4). On a GPU
    fused kernels keep less. Context parallelism gathers all keys and values, and keeps a mask.

    Transformer Engine: input and output of both norms 4h b; (2q + 2kv) b, with norms of queries and keys q + 2kv more;
    the softmax; and 3f b, for its SwiGLU is fused. Under FP8 what only feeds a matrix product is kept in one byte: 2h,
    the attention's output once more, and f.

    Tensor parallelism divides all but the norms, sequence parallelism the norms as well. This is the count of
    Korthikanti et al. 2022 (Reducing Activation Recomputation) eq. 1-4, for a gated MLP, grouped queries, attention
    that does not keep its scores, and no dropout.
    """
    p, b = config.parallel, ITEM_BYTES[config.model.dtype]
    h, q, kv = hf.hidden_size, hf.num_heads * hf.head_dim, hf.num_kv_heads * hf.head_dim
    softmax = max(b, 4) * hf.num_heads
    if layer_kind(config) == "transformer_engine":
        fed = 1 if config.model.fp8 else b  # bytes of what feeds a matrix product only
        norms = 2 * h * (b + fed)
        wide = (
            (2 * q + 2 * kv + (q + 2 * kv) * hf.qk_norm) * b
            + (q if config.model.fp8 else 0)
            + softmax
            + _mlp(hf, 2 * b + fed)
        )
    else:
        norms = 2 * h * (2 * max(b, 4) + b)
        wide = (3 * q + 2 * kv * p.cp) * b + softmax + _mlp(hf, 5 * b) + 4 * hf.head_dim * b * p.tp
        wide += 3 * (q + kv) * max(b, 4) * hf.qk_norm
        if p.cp > 1:
            longest = longest_sample(config)
            wide += p.tp * b * min(longest, MASK_ELEMENTS / (micro_batch(config) / p.cp))
    if hf.experts:  # tokens as sent to experts and as they come back, and the router's probabilities
        wide += 2 * hf.experts.top_k * h * b + 3 * 4 * hf.experts.count
    return norms / (p.tp if p.sp else 1) + wide / p.tp


def recomputed_activations(config: Config, hf: conversion.HFConfig) -> float:
    """Bytes per token of one layer that are not kept under ``model.recompute_modules``, but made again in backward.

    The MLP (or the experts) is run again from its input, which is kept anyway. Attention keeps no scores, so running
    it again saves its softmax only.
    """
    if {"mlp", "moe"} & set(config.model.recompute_modules):
        b = ITEM_BYTES[config.model.dtype]
        per_number = 2 * b + (1 if config.model.fp8 else b) if layer_kind(config) == "transformer_engine" else 5 * b
        return _mlp(hf, per_number) / config.parallel.tp
    return 0.0


def _mlp(hf: conversion.HFConfig, per_number: float) -> float:
    width = hf.experts.ffn_hidden_size * hf.experts.top_k if hf.experts else hf.ffn_hidden_size
    return width * per_number


def backward_transients(config: Config, hf: conversion.HFConfig, tokens: float) -> float:
    """Bytes that one layer's backward needs for a moment beyond what it keeps: where that is most, at the product of
    gate and up, the gradients of both (one more, of the product, takes the place of what is freed by then), three of
    the width h, and the gradient of the MLP's first weight.
    """
    p, b = config.parallel, ITEM_BYTES[config.model.dtype]
    gradients = _mlp(hf, 2 * b) / p.tp + 3 * hf.hidden_size * b / (p.tp if p.sp else 1)
    return tokens * gradients + _mlp(hf, 2 * b) / p.tp * hf.hidden_size


def head_memory(config: Config, hf: conversion.HFConfig, tokens: float) -> float:
    """Bytes at the end of the last stage: final norm, the response tokens' hidden states and their gradient, and at the
    moment of the loss a block of logits and the gradient of the output layer.

    See `megatron_ext.kernels.linear_vocab_statistics`. All tokens are taken to be response tokens.
    """
    p, b = config.parallel, ITEM_BYTES[config.model.dtype]
    h, accumulated = hf.hidden_size, max(b, 4)
    norm = h * (2 * b if layer_kind(config) == "transformer_engine" else 2 * accumulated + b)
    whole = tokens * conversion.padded_vocab(hf.vocab_size, p.tp) / p.tp
    block = min(whole, block_elements(config.train.loss_chunk_tokens, hf.vocab_size // p.tp, gpu=_on_gpu(config)))
    if whole * b <= config.train.keep_logits_gib * 2**30:
        block = whole
    rows = tokens * h * (2 * b + accumulated)  # under tensor parallelism every rank has all of them
    return tokens * norm / (p.tp if p.sp else 1) + rows + block * b + vocabulary_parameters(hf, p) * b


def _on_gpu(config: Config) -> bool:
    """What the plan is about: local layers are taken to be on a CPU, where they need more."""
    return layer_kind(config) == "transformer_engine"


# ---------------------------------------------------------------------------------------------------------- the sum


def learner_memory(config: Config, hf: conversion.HFConfig) -> Memory:
    """Upper estimate for the fullest micro-batch, all of whose tokens are response tokens.

    Without pipeline stages one rank has everything. With pp stages the first keeps the activations of up to pp
    micro-batches (1F1B; interleaving with v chunks multiplies by 1 + (pp - 1) / (pp v), Korthikanti et al. sec. 4.2.3),
    the next one less, the last those of one, and the head; the fullest counts. Recomputation keeps each layer's input,
    and one layer in full. A critic (``advantage.name=gae``) is a second model, which never runs at the same time. A
    reference policy takes the policy's place: it and the policy it displaces are on the host.
    """
    p = config.parallel
    tokens = micro_batch(config) / p.cp
    per_layer = layer_activations(config, hf)
    interleaving = 1 + (p.pp - 1) / (p.pp * p.vpp) if p.vpp > 1 else 1.0
    kept, once = per_layer, 0.0  # by a layer
    if config.model.recompute and config.model.recompute_modules:
        once = recomputed_activations(config, hf)
        kept -= once
    elif config.model.recompute:
        kept, once = hf.hidden_size * ITEM_BYTES[config.model.dtype] / (p.tp if p.sp else 1), per_layer
    stages = []
    for rank, number in enumerate(stage_layers(p, hf.num_layers)):
        in_flight, last = (p.pp - rank) * interleaving, rank + 1 == p.pp
        parts = _parameter_bytes(config, hf, rank)
        layer = tokens * once + backward_transients(config, hf, tokens)
        if hf.tied and p.pp == 1:  # the head's part of this gradient waits for the embedding's
            layer += vocabulary_parameters(hf, p) * ITEM_BYTES[config.model.dtype]
        head = head_memory(config, hf, tokens) if last else 0.0
        activations = tokens * number * kept * in_flight
        stages.append(replace(parts, activations=activations, momentary=max(head, layer)))
    return max(stages, key=lambda memory: memory.total)


def _parameter_bytes(config: Config, hf: conversion.HFConfig, stage: int) -> Memory:
    """Weights, gradients and optimizer state of a pipeline stage, without anything else."""
    p, dtype = config.parallel, config.model.dtype
    shards = data_parallel(config) * p.cp
    share = _stage_shares(hf, p)[stage]
    experts = _layer_parameters(hf, p)[1] * share
    shared = stage_parameters(hf, p)[stage] - experts
    models = 2 if config.advantage.name == "gae" else 1
    weights, gradients, state = (models * size for size in bytes_per_parameter(dtype, config.optim, shards))
    expert_state = models * bytes_per_parameter(dtype, config.optim, max(1, shards // p.ep))[2]
    fp8 = 2 * sum(_layer_parameters(hf, p)) * share if config.model.fp8 else 0.0  # rows and columns, a byte each
    optimizer = state * shared + expert_state * experts
    policy = weights / models * (shared + experts)
    return Memory(
        weights=weights * (shared + experts) + models * fp8,
        gradients=gradients * (shared + experts),
        optimizer=optimizer,
        activations=0.0,
        momentary=0.0,
        optimizer_elsewhere=config.optim.offload,
        host=(2 * policy if config.reference.kl_coef else 0.0)
        + (optimizer if config.optim.offload or config.rollout.colocated else 0.0)
        + (weights * (shared + experts) if config.rollout.colocated else 0.0)
        # A background checkpoint's copy: the state of this rank, and its share of the weights.
        + (optimizer + weights * (shared / shards + experts / max(1, shards // p.ep))) * config.train.async_save,
    )
