"""The reference policy of a KL penalty: weights that are swapped into the policy's model for one pass per batch.

There is no second model. This rank's slices of the reference are kept in host memory (page-locked if there is a GPU).
For the reference pass they are exchanged with the policy's weights, bit for bit. So the reference has the policy's
layout, kernels and packing and takes no device memory; it costs three copies of the weights over the bus per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import conversion
from megatron_ext.learner import weights
from megatron_ext.learner.offload import model_tensors
from megatron_ext.learner.step import TrainBatch
from megatron_ext.rl.types import TokenStats


class Reference:
    """Log-probabilities under the weights of a Hugging Face directory, computed by the policy's model."""

    def __init__(
        self,
        hf: conversion.HFConfig,
        directory: Path,
        chunks: list[Any],
        statistics: Callable[[TrainBatch], TokenStats],
    ) -> None:
        """Read this rank's slices of the weights; those of ``chunks`` are unchanged afterwards.

        Args:
            hf: architecture of the policy, and so of the reference.
            chunks: this rank's model chunks.
            statistics: the statistics pass through ``chunks``, a collective of all ranks.

        Raises:
            ValueError: for tensors that are missing, unknown or misshapen for the model.
        """
        self._chunks, self._statistics = chunks, statistics
        device = model_tensors(chunks)
        self._policy = [_host_like(tensor) for tensor in device]
        self._reference = [_host_like(tensor) for tensor in device]
        _copy(self._policy, device)
        weights.import_hf(hf, directory, chunks)
        _copy(self._reference, device)
        _copy(device, self._policy)

    def logp(self, batch: TrainBatch) -> Tensor:
        """log p of every response token under the reference, (T,), on every rank.

        Recorded experts belong to the policy; the reference uses its own routing.
        """
        with self._in_place():
            return self._statistics(replace(batch, experts=None)).logp

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        device = model_tensors(self._chunks)
        _copy(self._policy, device)
        _copy(device, self._reference)
        try:
            yield
        finally:
            _copy(device, self._policy)


def _host_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the host must not touch either side before
