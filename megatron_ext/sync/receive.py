"""The receiving side of a weight update, without vLLM: checks of files or buckets before a worker loads them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ext.sync.base import Clock, WeightDigest
from megatron_ext.sync.broadcast import Entry, broadcast, layout

LM_HEAD = "lm_head.weight"


@dataclass
class Update:
    """One complete update, as `sync.disk` (directory, files) or `sync.broadcast` (buckets) describes it."""

    version: int
    checksum: str
    digest: str = "xxh3"  # kind of `WeightDigest`
    directory: str = ""
    files: list[str] = field(default_factory=list)
    buckets: list[list[dict[str, Any]]] = field(default_factory=list)


def receive_buckets(
    group: Any, buckets: list[list[Entry]], device: torch.device, timeout_s: float
) -> Iterator[dict[str, Tensor]]:
    """The tensors of one bucket after the other, each in separate memory, because vLLM may keep them until the end.

    The next bucket arrives while the caller checks and loads this one.
    """

    def receive(entries: list[Entry]) -> Tensor:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        data = torch.empty(layout(entries)[1], dtype=torch.uint8, device=device)
        broadcast(group, data, timeout_s)
        return data

    with ThreadPoolExecutor(1, thread_name_prefix="weights") as thread:
        coming = [thread.submit(receive, buckets[0])] if buckets else []
        for index, entries in enumerate(buckets):
            data = coming.pop().result()
            if index + 1 < len(buckets):
                coming.append(thread.submit(receive, buckets[index + 1]))
            yield {
                entry.name: data[offset : offset + entry.nbytes].view(getattr(torch, entry.dtype)).reshape(entry.shape)
                for offset, entry in zip(layout(entries)[0], entries, strict=True)
            }


def read_verified(info: Update, clock: Clock) -> dict[str, Tensor]:
    """All tensors of an update, mapped and not copied. ValueError if their checksum is not the announced one."""
    weights: dict[str, Tensor] = {}
    digest = WeightDigest(info.digest)
    for name in info.files:
        found = load_file(Path(info.directory) / name)
        clock.lap("receive")
        for key, tensor in found.items():
            digest.add(key, tensor)
            weights[key] = tensor
        clock.lap("check")
    verify(digest, info)
    return weights


def verify(digest: WeightDigest, info: Update) -> None:
    """ValueError unless the received checksum is the announced one."""
    found = digest.hexdigest()
    if found != info.checksum:
        raise ValueError(
            f"weight update to version {info.version} refused: checksum {found[:12]}, announced {info.checksum[:12]}; "
            "send the update again"
        )


def check_complete(given: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    """ValueError unless names and shapes are those of the checkpoint; a tied output head may be there or not."""
    optional = {LM_HEAD} if tied else set()
    missing = sorted(shapes.keys() - given.keys() - optional)
    unknown = sorted(given.keys() - shapes.keys() - optional)
    if missing or unknown:
        raise ValueError(
            f"weight update refused: {len(missing)} tensors missing {missing[:3]}, {len(unknown)} unknown "
            f"{unknown[:3]}; send exactly the names of the checkpoint"
        )
    for name, shape in shapes.items():
        if given.get(name, shape) != shape:
            raise ValueError(f"weight update refused: {name} has shape {given[name]}, expected {shape}")
