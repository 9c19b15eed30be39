"""Move the memory of a model that is not in use to the host and back, bit for bit.

Megatron-Core 0.16 has three methods. ``DistributedDataParallel.offload_grad_buffers`` is used as it is. Its
``optimizer.offload_to_cpu`` gives parameters new storage; in float32 the distributed optimizer's shards are then no
longer views of the weights, and later updates are lost. Its ``optimizer_cpu_offload`` keeps the state on the host
permanently and computes the updates there. Here storages are emptied and refilled in place, so views stay valid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class Parking:
    """Storages whose bytes are on the host. Host memory is page-locked beside a GPU, and kept for the next time."""

    def __init__(self) -> None:
        self._parked: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._spare: dict[int, list[Tensor]] = {}  # by size

    def __bool__(self) -> bool:
        return bool(self._parked)

    @property
    def nbytes(self) -> int:
        """Bytes that are on the host now."""
        return sum(host.nbytes for _, host in self._parked)

    @torch.no_grad()
    def park(self, tensors: Iterable[Tensor]) -> None:
        """Copy the storages of ``tensors`` to the host and empty them. Empty storages stay empty.

        Until :meth:`unpark` reading any of their views is an error that torch does not always catch.
        """
        # By address: views share a storage, and each call of untyped_storage() gives a new object for it.
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        storages.pop(0, None)
        moved = [(storage, self._to_host(storage)) for storage in storages.values()]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies are asynchronous
        for storage, _ in moved:
            storage.resize_(0)
        self._parked += moved

    @torch.no_grad()
    def unpark(self) -> None:
        """Restore all storages."""
        for storage, host in self._parked:
            storage.resize_(host.nbytes)
            _bytes(storage).copy_(host, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # before the host memory is used again
        for _, host in self._parked:
            self._spare.setdefault(host.nbytes, []).append(host)
        self._parked.clear()

    def _to_host(self, storage: torch.UntypedStorage) -> Tensor:
        spare = self._spare.get(storage.nbytes())
        pinned = torch.cuda.is_available()
        host = spare.pop() if spare else torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
        return host.copy_(_bytes(storage), non_blocking=True)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def model_tensors(chunks: list[Any]) -> list[Tensor]:
    """The weights of a model's chunks."""
    return [parameter.data for chunk in chunks for parameter in chunk.parameters()]


def drop_fp8_copies(chunks: list[Any]) -> None:
    """Drop Transformer Engine's cached FP8 weights; the next pass quantises them again."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        getattr(module, "_fp8_workspaces", {}).clear()


def optimizer_tensors(optimizer: Any, chunks: list[Any]) -> Iterator[Tensor]:
    """Moments and float32 master weights of a Megatron optimizer; nothing that shares memory with the model's weights.

    In float32 what the optimizer calls its parameters are the weights themselves, or views of them. Step counts are
    scalars, which stay.
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in model_tensors(chunks)}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if inner is None:  # a rank whose stage has nothing to train
            continue
        own = [p.data for group in inner.param_groups for p in group["params"]]
        yield from (tensor for tensor in own if tensor.untyped_storage().data_ptr() not in weights)
        for state in inner.state.values():
            yield from (v for v in state.values() if torch.is_tensor(v) and v.dim() and v.device == own[0].device)
