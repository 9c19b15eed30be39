"""Routing replay for mixtures of experts: the learner sends each token to the experts that the rollout engine chose.

Engine and learner round differently. If two experts have nearly the same score, engine and learner may choose different
ones, and the log-probability of the token changes by far more than rounding: the importance ratio of a policy that has
not been updated is not 1 ("Rollout Routing Replay", R3, arXiv 2510.11370). Only the *indices* are replayed. The weights
of the chosen experts come from the learner's own router, so its gradient is unchanged.

Megatron-Core has the mechanism: a router with a `RouterReplay` takes its experts from it. This module provides the
indices, and makes sure that every pass uses those of its own micro-batch: recomputation in the backward pass happens
after the forward passes of later micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

import conversion
from megatron_ext.rl import packing


class Replay(RouterReplay):
    """The replay of one router. Without indices (:meth:`clear`) the router chooses as usual."""

    def __init__(self, column: int, *, recomputed: bool) -> None:
        """``column``: of the router's layer in `MicroBatch.experts_M`; ``recomputed``: backward routes again."""
        super().__init__()
        RouterReplay.global_router_replay_instances.remove(self)  # this list would keep every model's routers alive
        self.column, self.recomputed = column, recomputed

    def begin(self, indices: Tensor, *, training: bool) -> None:
        """``indices``: (tokens of this rank, top k) int64, of the forward pass that comes next."""
        self.target_topk_idx, self.router_replay_action = indices, RouterReplayAction.REPLAY_FORWARD
        if training and self.recomputed:  # backward passes follow the order of the forward passes
            self.replay_backward_list.append(indices)

    def clear(self) -> None:
        """Forget all indices."""
        self.clear_indices()
        self.clear_router_replay_action()

    def get_replay_topk(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `RouterReplay`; a call during the backward pass comes from recomputation."""
        action = self.router_replay_action
        if action is not None and torch._C._current_graph_task_id() != -1:
            self.router_replay_action = RouterReplayAction.REPLAY_BACKWARD
        try:
            chosen: tuple[Tensor, Tensor] = super().get_replay_topk(*args, **kwargs)
        finally:
            self.router_replay_action = action
        return chosen


def install(chunks: Sequence[Any], hf: conversion.HFConfig) -> None:
    """Attach a `Replay` to every router of these model chunks; does nothing to a dense model."""
    columns = {layer: column for column, layer in enumerate(filter(hf.sparse, range(hf.num_layers)))}
    for chunk in chunks:
        config = chunk.config
        whole = config.recompute_granularity == "full"
        recomputed = whole or (config.recompute_granularity == "selective" and "moe" in config.recompute_modules)
        chunk.routing_replays = []
        for router in (module for module in chunk.modules() if isinstance(module, TopKRouter)):
            router.router_replay = Replay(columns[router.layer_number - 1], recomputed=recomputed)
            chunk.routing_replays.append(router.router_replay)


def _replays(chunk: Any) -> list[Replay]:
    return getattr(chunk, "routing_replays", [])


def begin(chunk: Any, experts_M: Tensor | None, device: torch.device) -> None:
    """Before the forward pass of a micro-batch through ``chunk``: its experts, see `local_experts`; None: no replay."""
    replays = _replays(chunk)
    if experts_M is None or not replays:
        return
    on_device = experts_M.to(device, non_blocking=True)
    for replay in replays:
        replay.begin(on_device[:, replay.column].long(), training=chunk.training)


def clear(chunks: Sequence[Any]) -> None:
    """After a pass over all micro-batches."""
    for chunk in chunks:
        for replay in _replays(chunk):
            replay.clear()


def local_experts(
    experts: Sequence[Tensor], packed: packing.PackedBatch, local_M: Tensor, hf: conversion.HFConfig, *, sp: bool
) -> Tensor:
    """(tokens of this rank's routers, layers with experts, top k): its share of a packed micro-batch's experts.

    ``experts``: of each packed sample (fed tokens, layers with experts, top k), integers. Padding tokens are
    distributed evenly over the experts.

    Raises ValueError where a sample has another number of tokens, layers or experts per token than the model.
    """
    assert hf.experts is not None
    count, top_k = hf.experts.count, hf.experts.top_k
    layers = sum(map(hf.sparse, range(hf.num_layers)))
    spread_M = torch.arange(len(packed.tokens_M))[:, None] * top_k + torch.arange(top_k)
    dtype = torch.uint8 if count <= 256 else torch.int16
    whole = (spread_M % count).to(dtype)[:, None].expand(-1, layers, -1).clone()
    for place, (own, rows) in enumerate(zip(experts, _places(packed, len(experts)), strict=True)):
        if own.shape != (len(rows), layers, top_k):
            raise ValueError(
                f"sample {place} of a micro-batch has experts of shape {tuple(own.shape)}, and the model needs "
                f"{(len(rows), layers, top_k)}: the rollouts were written by another model, or set "
                "rollout.routing_replay=false"
            )
        whole[rows] = own.to(dtype)
    mine = whole[local_M]
    if sp:  # sequence parallelism gives each tensor-parallel rank a run of the tokens
        mine = mine.chunk(parallel_state.get_tensor_model_parallel_world_size())[
            parallel_state.get_tensor_model_parallel_rank()
        ]
    return mine


def _places(packed: packing.PackedBatch, samples: int) -> Iterator[Tensor]:
    for sample in range(samples):
        yield (packed.seq_index_M == sample).nonzero()[:, 0]
