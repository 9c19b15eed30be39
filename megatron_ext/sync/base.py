"""The contract of a weight update, the same for every transport, and the checksum that seals it.

begin -> tensors in Hugging Face names -> commit(version, checksum) -> prefix cache reset. A transport (`sync.disk`;
NCCL would broadcast in `send`) moves the bytes; `Servers` is the control plane it drives. Whatever goes wrong raises,
and a server that did not confirm version and checksum serves nothing until a full update succeeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class WeightUpdateError(RuntimeError):
    """An update was refused, incomplete, or not confirmed in time."""


class Servers(Protocol):
    def start_update(self) -> None: ...  # no request runs afterwards, none starts
    def receive(self, info: dict[str, Any]) -> None: ...  # every worker takes the weights in; returns when all have
    def finish_update(self, version: int, checksum: str) -> None: ...  # confirm, reset the prefix cache, resume
    def fail_update(self) -> None: ...  # servers that were reached stay unusable


class WeightSync(Protocol):
    def begin(self, version: int) -> None: ...
    def send(self, name: str, tensor: Tensor) -> None: ...
    def commit(self, version: int, checksum: str) -> None: ...
    def abort(self) -> None: ...


class WeightDigest:
    """SHA-256 over names, dtypes, shapes and bytes of a set of tensors, whatever their order."""

    def __init__(self) -> None:
        self._parts: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for a name seen before."""
        if name in self._parts:
            raise ValueError(f"weight {name!r} occurs twice in one update: every name is sent once")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        head = f"{tensor.dtype} {tuple(tensor.shape)} "
        self._parts[name] = head + hashlib.sha256(data).hexdigest()

    def hexdigest(self) -> str:
        lines = "\n".join(f"{name} {part}" for name, part in sorted(self._parts.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def push_weights(sync: WeightSync, version: int, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Run one whole update and return its checksum. An exception from ``tensors`` leaves the servers as they were."""
    digest = WeightDigest()
    try:
        sync.begin(version)
        for name, tensor in tensors:
            digest.add(name, tensor)
            sync.send(name, tensor)
        checksum = digest.hexdigest()
        sync.commit(version, checksum)
    except BaseException:
        sync.abort()
        raise
    return checksum
