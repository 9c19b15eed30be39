"""Weights in and out of the running model by name, tensor by tensor: the learner's side of `conversion`.

Neither direction holds a second copy of the model: import reads only the slices that a rank needs; export gathers one
bucket at a time and yields one full tensor after the other.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

import conversion
from conversion.hf_to_megatron import check_source
from conversion.pickled import open_hf
from megatron_ext.learner import control

BUCKET_BYTES = 256 << 20  # of full tensors, gathered at a time: a mixture has tens of thousands of small ones
SMALLEST_BYTES = 16 << 20  # of a bucket where replicas share the work
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(.*\.local_experts\.)(\d+)(\..*)")


def named_weights(chunks: list[Any]) -> dict[str, Tensor]:
    """As `named_parameters`, with the biases of routers, which Megatron keeps as buffers in float32."""
    return _named(chunks, lambda chunk: (*chunk.named_parameters(), *_router_biases(chunk)))


def named_parameters(chunks: list[Any]) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank under model-wide names, spelled as in the local layer spec.

    Layers are counted over all pipeline stages, experts over all expert-parallel ranks.
    """
    return _named(chunks, lambda chunk: chunk.named_parameters())


def _router_biases(chunk: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith(".router.expert_bias"))


def _named(chunks: list[Any], tensors: Callable[[Any], Iterable[tuple[str, Any]]]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for chunk in unwrap_model(chunks):
        # Megatron numbers layers from 1 over the whole model, parameters from 0 within the chunk.
        numbers = {str(i): layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
        for name, tensor in tensors(chunk):
            match = _LAYER.match(name)
            if match:
                name = f"decoder.layers.{numbers[match[1]]}.{name[match.end() :]}"
            named[_global_expert(conversion.local_name(name), chunk.config)] = tensor
    return named


def _global_expert(name: str, config: Any) -> str:
    """Model-wide expert number in a name: Megatron numbers the experts of each expert-parallel rank from 0."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name
    here = config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
    return f"{match[1]}{parallel_state.get_expert_model_parallel_rank() * here + int(match[2])}{match[3]}"


@dataclass(frozen=True, slots=True)
class _Slices:
    """This process's part in the tensor-parallel slices of a tensor; experts have separate groups."""

    rank: int
    size: int
    group: torch.distributed.ProcessGroup
    replica: int  # of the data- and context-parallel ranks that hold the same slice
    replicas: int


def _slices() -> Callable[[str], _Slices]:
    ps = parallel_state
    dense = _Slices(
        ps.get_tensor_model_parallel_rank(),
        ps.get_tensor_model_parallel_world_size(),
        ps.get_tensor_model_parallel_group(),
        ps.get_data_parallel_rank(with_context_parallel=True),
        ps.get_data_parallel_world_size(with_context_parallel=True),
    )
    expert = _Slices(
        ps.get_expert_tensor_parallel_rank(),
        ps.get_expert_tensor_parallel_world_size(),
        ps.get_expert_tensor_parallel_group(),
        ps.get_expert_data_parallel_rank(),
        ps.get_expert_data_parallel_world_size(),
    )
    return lambda name: expert if _EXPERT.fullmatch(name) else dense


@torch.no_grad()
def import_hf(hf: conversion.HFConfig, directory: Path, chunks: list[Any], *, skip: tuple[str, ...] = ()) -> None:
    """Fill this rank's parameters but those named in ``skip`` from a Hugging Face directory.

    Raises ValueError for tensors that are missing, unknown or misshapen.
    """
    reader = open_hf(directory)
    check_source(hf, reader)
    slices = _slices()
    for name, parameter in named_weights(chunks).items():
        if name not in skip:
            full, part = conversion.import_tensor(hf, name, reader), slices(name)
            parameter.copy_(conversion.shard(name, full, part.rank, part.size))
    reader.close()


@torch.no_grad()
def export_hf(
    hf: conversion.HFConfig, chunks: list[Any], *, explicit_lm_head: bool = False, spread: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Every weight as a full Hugging Face tensor on global rank 0, a bucket of Megatron tensors at a time.

    A collective: all ranks must exhaust the iterator, which yields nothing on ranks other than 0. The ranks that hold
    the first replica of a bucket's slices gather them; when rank 0 is not the first of these, it is sent the result.

    With ``spread`` replicas take turns in gathering a bucket, and each tensor is yielded on one of the ranks that
    gathered it, about as many bytes on each of these.
    """
    mine, slices = named_weights(chunks), _slices()
    rank = torch.distributed.get_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    names = conversion.megatron_names(hf)
    leading = [name in mine and slices(name).replica == 0 and slices(name).rank == 0 for name in names]
    some = next(iter(mine.values()))
    # of every tensor, also those of other stages: all ranks hold the same dtypes
    dtypes = {name: torch.float32 if name.endswith(".router.expert_bias") else some.dtype for name in names}
    shapes = {name: _padded_shape(hf, name, tp_size) for name in names}
    owners = dict(zip(names, _owners(names, leading, some.device), strict=True))
    nbytes = {name: math.prod(shapes[name]) * some.itemsize for name in names}
    if spread:
        yield from _spread(hf, mine, slices, owners, nbytes, explicit_lm_head=explicit_lm_head)
        return
    for bucket in _buckets(names, owners, nbytes, BUCKET_BYTES):
        part, owner = slices(bucket[0]), owners[bucket[0]]
        fulls: list[Tensor] = []
        if all(name in mine for name in bucket) and part.replica == 0:
            fulls = _gather([mine[name].detach() for name in bucket], bucket, part)
            if owner != 0 and rank == owner:
                torch.distributed.send(_pack(fulls), dst=0)
        if rank == 0:
            if owner != 0:
                empty = [torch.empty(shapes[name], dtype=dtypes[name], device=some.device) for name in bucket]
                packed = torch.empty(sum(tensor.nbytes for tensor in empty), dtype=torch.uint8, device=some.device)
                torch.distributed.recv(packed, src=owner)
                fulls = _unpack(packed, empty)
            for name, full in zip(bucket, fulls, strict=True):
                yield from conversion.export_tensors(hf, name, full, explicit_lm_head=explicit_lm_head)


def _spread(
    hf: conversion.HFConfig,
    mine: Mapping[str, Tensor],
    slices: Callable[[str], _Slices],
    owners: Mapping[str, int],
    nbytes: Mapping[str, int],
    *,
    explicit_lm_head: bool,
) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of an export of which every rank takes some."""
    names, device = list(owners), next(iter(mine.values())).device
    stages, here = _stages(names, mine, device), parallel_state.get_pipeline_model_parallel_rank()
    dense = slices(names[0])  # at least as many replicas as of experts
    limit = max(BUCKET_BYTES // dense.replicas, SMALLEST_BYTES)
    loads: dict[_Slices, list[int]] = {}  # bytes that each rank of a group has taken
    for number, bucket in enumerate(_buckets(names, owners, nbytes, limit)):
        part = slices(bucket[0])
        if stages[bucket[0]] != here or number % part.replicas != part.replica or bucket[0] not in mine:
            continue
        fulls = _gather([mine[name].detach() for name in bucket], bucket, part)
        for index in _share([full.nbytes for full in fulls], part.rank, loads.setdefault(part, [0] * part.size)):
            yield from conversion.export_tensors(hf, bucket[index], fulls[index], explicit_lm_head=explicit_lm_head)


def _share(sizes: list[int], rank: int, loads: list[int]) -> list[int]:
    """Indices that ``rank`` takes: each goes to the rank that has the fewest bytes so far, by ``loads``."""
    taken = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        least = min(range(len(loads)), key=loads.__getitem__)
        loads[least] += sizes[index]
        if least == rank:
            taken.append(index)
    return taken


def _padded_shape(hf: conversion.HFConfig, name: str, tp_size: int) -> list[int]:
    shape = list(conversion.megatron_shape(hf, name))
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        shape[0] = conversion.padded_vocab(shape[0], tp_size)
    return shape


def _buckets(names: list[str], owners: Mapping[str, int], nbytes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Neighbours that the same ranks gather, up to ``limit`` bytes of full tensors together, or one that is larger."""
    for _, group in itertools.groupby(names, lambda name: (owners[name], _EXPERT.fullmatch(name) is None)):
        bucket: list[str] = []
        size = 0
        for name in group:
            if bucket and size + nbytes[name] > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += nbytes[name]
        yield bucket


def _gather(local: list[Tensor], names: list[str], part: _Slices) -> list[Tensor]:
    """The full tensors of a bucket, from the slices of all ranks of the group: one collective."""
    if part.size == 1:
        return [conversion.unshard(name, [tensor.contiguous()]) for name, tensor in zip(names, local, strict=True)]
    packed = _pack(local)
    everyone = [torch.empty_like(packed) for _ in range(part.size)]
    torch.distributed.all_gather(everyone, packed, group=part.group)
    slices = zip(*(_unpack(theirs, local) for theirs in everyone), strict=True)
    return [conversion.unshard(name, list(pieces)) for name, pieces in zip(names, slices, strict=True)]


def _pack(tensors: list[Tensor]) -> Tensor:
    """The bytes of all, one after the other."""
    return torch.cat([tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors])


def _unpack(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The inverse of `_pack`, for tensors of these shapes and dtypes."""
    parts = packed.split([tensor.nbytes for tensor in like])
    return [_typed(part, tensor) for part, tensor in zip(parts, like, strict=True)]


def _typed(part: Tensor, like: Tensor) -> Tensor:
    if part.storage_offset() % like.itemsize:  # a view as a wider type must begin at a multiple of its size
        part = part.clone()
    return part.view(like.dtype).reshape(like.shape)


def _owners(names: list[str], leading: list[bool], device: torch.device) -> list[int]:
    """For each tensor the lowest global rank of those that lead the gathering of its slices."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    candidates = torch.tensor([rank if leads else world for leads in leading], device=device)
    torch.distributed.all_reduce(candidates, op=torch.distributed.ReduceOp.MIN)
    owners: list[int] = candidates.tolist()
    assert max(owners) < world, f"no rank holds {names[owners.index(world)]}"
    return owners


def _stages(names: list[str], mine: Mapping[str, Tensor], device: torch.device) -> dict[str, int]:
    """For each tensor the first pipeline stage that holds it: tied embeddings are in two."""
    here = parallel_state.get_pipeline_model_parallel_rank()
    nowhere = parallel_state.get_pipeline_model_parallel_world_size()
    found = torch.tensor([here if name in mine else nowhere for name in names], device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
    return dict(zip(names, found.tolist(), strict=True))


def nonfinite_parameters(chunks: Iterable[torch.nn.Module]) -> int:
    """How many of this model's numbers are NaN or infinite, over all ranks (replicas count each). A collective."""
    count = sum(int((~torch.isfinite(p.detach())).sum()) for chunk in chunks for p in chunk.parameters())
    total = torch.tensor([count])
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(total, group=control.group())
    return int(total)
