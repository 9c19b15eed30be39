"""Weights in and out of the running model by name, tensor by tensor: the learner's side of `conversion`.

Neither direction holds a second copy of the model: import reads the slices a rank needs, export hands over one full
tensor at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

import conversion
from conversion.hf_files import HFReader
from conversion.hf_to_megatron import check_source

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def named_parameters(chunks: list[Any]) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank under model-wide names (the layer number counted over all pipeline stages)."""
    named: dict[str, torch.nn.Parameter] = {}
    for chunk in unwrap_model(chunks):
        # Megatron numbers layers from 1 over the whole model, parameters from 0 within the chunk.
        numbers = {str(i): layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
        for name, parameter in chunk.named_parameters():
            match = _LAYER.match(name)
            if match:
                name = f"decoder.layers.{numbers[match[1]]}.{name[match.end() :]}"
            named[name] = parameter
    return named


@torch.no_grad()
def import_hf(hf: conversion.HFConfig, directory: Path, chunks: list[Any], *, skip: tuple[str, ...] = ()) -> None:
    """Fill this rank's parameters but those named in ``skip`` from a Hugging Face directory.

    Raises ValueError for tensors that are missing, unknown or misshapen.
    """
    reader = HFReader(directory)
    check_source(hf, reader)
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in named_parameters(chunks).items():
        if name not in skip:
            full = conversion.import_tensor(hf, name, reader)
            parameter.copy_(conversion.shard(name, full, rank, size))
    reader.close()


@torch.no_grad()
def export_hf(
    hf: conversion.HFConfig, chunks: list[Any], *, explicit_lm_head: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Every weight as a full Hugging Face tensor on global rank 0, one Megatron tensor at a time.

    A collective: all ranks must exhaust the iterator, which yields nothing on ranks other than 0. The pipeline stage
    that owns a tensor gathers its tensor-parallel slices and, when it is not the first stage, sends them to rank 0.
    """
    mine = {conversion.local_name(name): parameter for name, parameter in named_parameters(chunks).items()}
    rank = torch.distributed.get_rank()
    first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    tp_group = parallel_state.get_tensor_model_parallel_group()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    leader = first_replica and parallel_state.get_tensor_model_parallel_rank() == 0
    names = conversion.megatron_names(hf)
    for name, owner in zip(names, _owners(names, mine, leader), strict=True):
        if name in mine and first_replica:
            local = mine[name].detach().contiguous()
            pieces = [torch.empty_like(local) for _ in range(tp_size)]
            if tp_size > 1:
                torch.distributed.all_gather(pieces, local, group=tp_group)
            else:
                pieces = [local]
            full = conversion.unshard(name, pieces)
            if owner != 0 and rank == owner:
                torch.distributed.send(full.contiguous(), dst=0)
        if rank == 0:
            if owner != 0:
                some = next(iter(mine.values()))
                shape = list(conversion.megatron_shape(hf, name))
                if conversion.local_name(name) in ("embedding.word_embeddings.weight", "output_layer.weight"):
                    shape[0] = conversion.padded_vocab(shape[0], tp_size)
                full = torch.empty(shape, dtype=some.dtype, device=some.device)
                torch.distributed.recv(full, src=owner)
            yield from conversion.export_tensors(hf, name, full, explicit_lm_head=explicit_lm_head)


def _owners(names: list[str], mine: dict[str, Any], leader: bool) -> list[int]:
    """For each tensor the global rank, lowest in tensor and data parallelism, whose pipeline stage holds it."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    some = next(iter(mine.values()))
    candidates = torch.tensor([rank if leader and name in mine else world for name in names], device=some.device)
    torch.distributed.all_reduce(candidates, op=torch.distributed.ReduceOp.MIN)
    owners: list[int] = candidates.tolist()
    assert max(owners) < world, f"no rank holds {names[owners.index(world)]}"
    return owners
