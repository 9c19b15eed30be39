"""The receiving side of a weight update, without vLLM: checks of files or buckets before a worker loads them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ext.sync.base import Clock, WeightDigest, checksum_of, copy_by_threads
from megatron_ext.sync.broadcast import broadcast
from megatron_ext.sync.buckets import Entry, layout, tensors_of
from megatron_ext.sync.ipc import fetch
from megatron_ext.sync.node import Checks

LM_HEAD = "lm_head.weight"
UPLOAD_BYTES = 256 << 20  # of a tensor that `Upload` is used for; an embedding is larger


@dataclass
class Update:
    """One complete update, as its transport describes it.

    `sync.disk` gives directory and files, `sync.broadcast` buckets, `sync.ipc` buckets and a socket.
    """

    version: int
    checksum: str
    digest: str = "xxh3"  # kind of `WeightDigest`
    directory: str = ""
    files: list[str] = field(default_factory=list)
    tensors: dict[str, str] = field(default_factory=dict)  # `WeightDigest.manifest`; not of a broadcast
    delta: bool = False  # whether a receiver may keep layers that have not changed since its last update
    buckets: list[list[dict[str, Any]]] = field(default_factory=list)
    socket: str = ""


def receive_buckets(
    group: Any, buckets: list[list[Entry]], device: torch.device, timeout_s: float
) -> Iterator[dict[str, Tensor]]:
    """The tensors of one bucket after the other, each in separate memory, because vLLM may keep them until the end.

    The next bucket arrives while the caller checks and loads this one.
    """

    def receive(entries: list[Entry]) -> Tensor:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        data = new_memory(layout(entries)[1], device)
        broadcast(group, data, timeout_s)
        return data

    with ThreadPoolExecutor(1, thread_name_prefix="weights") as thread:
        coming = [thread.submit(receive, buckets[0])] if buckets else []
        for index, entries in enumerate(buckets):
            data = coming.pop().result()
            if index + 1 < len(buckets):
                coming.append(thread.submit(receive, buckets[index + 1]))
            yield tensors_of(data, entries)


def new_memory(nbytes: int, device: torch.device) -> Tensor:
    """(nbytes,) uint8, undefined. On the host from numpy, which asks for huge pages: to fill new memory then takes 0.4
    times the CPU time of torch's."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty(nbytes, dtype=np.uint8))
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def read_verified(info: Update, clock: Clock, held: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Tensors of an update's files, mapped and not copied; with ``held`` only those of layers that changed.

    The processes of a node that read the same files share the work: each file is checked by the first of them, and the
    others wait for its verdict (`node.Checks`). ``held``: manifest of what the caller's model holds.

    ValueError if any tensor is not the announced one, whichever process found it.
    """
    check_list(info)
    found = {name: load_file(Path(info.directory) / name) for name in info.files}
    clock.lap("receive")
    check_names(info, [key for tensors in found.values() for key in tensors])

    def check(file: str) -> None:
        check_tensors(info, found[file], f" in {file}")

    Checks(Path(info.directory), f"{info.version}-{info.checksum}").run(info.files, check)
    clock.lap("check")
    stale = changed(info.tensors, held or {})
    return {key: tensor for tensors in found.values() for key, tensor in tensors.items() if key in stale}


def read_shared(
    info: Update, device: torch.device, clock: Clock, held: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """As `read_verified`, for an update in memory that the learner shares (`sync.ipc`). Tensors are on ``device``."""
    check_list(info)
    try:
        buckets = fetch(info.socket, info.version, info.checksum, device)
    except (OSError, ValueError) as error:
        raise refusal(info, str(error)) from error
    entries = [[Entry(**entry) for entry in bucket] for bucket in info.buckets]
    check_names(info, [entry.name for bucket in entries for entry in bucket])
    if len(buckets) != len(entries):
        raise refusal(info, f"{len(buckets)} buckets arrived, {len(entries)} were announced")
    found: dict[str, Tensor] = {}
    try:
        for bucket, inside in zip(buckets, entries, strict=True):
            found |= tensors_of(bucket, inside)
    except ValueError as error:
        raise refusal(info, str(error)) from error
    clock.lap("receive")
    check_tensors(info, found, "")
    clock.lap("check")
    stale = changed(info.tensors, held or {})
    return {key: tensor for key, tensor in found.items() if key in stale}


class Upload:
    """Copies tensors from the host to a GPU through two pinned buffers, one being filled while the other one is sent.

    A plain copy from a mapped file reaches an eighth of the bus's speed (H100: 8 of 55 GB/s).
    """

    def __init__(self, device: torch.device, nbytes: int = 64 << 20) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self._sent = [torch.cuda.Event() for _ in range(2)] if on_gpu else []  # at first: complete
        self._turn = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """A copy on the device, in the order of the current stream."""
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        there = torch.empty(len(flat), dtype=torch.uint8, device=self._device)
        for start in range(0, len(flat), len(self._buffers[0])):
            part, self._turn = flat[start : start + len(self._buffers[0])], 1 - self._turn
            if self._sent:
                self._sent[self._turn].synchronize()
            filled = self._buffers[self._turn][: len(part)]
            copy_by_threads(filled, part)
            there[start : start + len(part)].copy_(filled, non_blocking=True)
            if self._sent:
                self._sent[self._turn].record()
        return there.view(tensor.dtype).reshape(tensor.shape)


def check_list(info: Update) -> None:
    """ValueError unless the announced checksum is that of the announced list of tensors."""
    if checksum_of(info.digest, info.tensors) != info.checksum:
        raise refusal(info, "its list of tensors is not the announced one")


def check_names(info: Update, given: Sequence[str]) -> None:
    """ValueError unless every announced tensor is given, once."""
    if Counter(given) != Counter(info.tensors.keys()):
        raise refusal(info, "it holds other tensors than announced")


def check_tensors(info: Update, tensors: Mapping[str, Tensor], where: str) -> None:
    """ValueError unless these are as announced."""
    digest = WeightDigest(info.digest)
    for key, tensor in tensors.items():
        digest.add(key, tensor)
    wrong = [key for key, entry in digest.manifest().items() if entry != info.tensors[key]]
    if wrong:
        raise refusal(info, f"{wrong[0]}{where} is not what was sent")


def changed(tensors: Mapping[str, str], held: Mapping[str, str]) -> set[str]:
    """Names to load: all of a layer of which one changed, because engines fuse tensors within a layer."""
    layers = {layer_of(name) for name, entry in tensors.items() if held.get(name) != entry}
    return {name for name in tensors if layer_of(name) in layers}


def layer_of(name: str) -> str:
    """What is loaded together: a decoder layer, or everything outside of layers (a tied head needs its embedding)."""
    match = re.match(r"(.*?\.layers\.\d+)\.", name)
    return match[1] if match else ""


def refusal(info: Update, why: str) -> ValueError:
    return ValueError(f"weight update to version {info.version} refused: {why}; send the update again")


def verify(digest: WeightDigest, info: Update) -> None:
    """ValueError unless the received checksum is the announced one."""
    found = digest.hexdigest()
    if found != info.checksum:
        raise refusal(info, f"checksum {found[:12]}, announced {info.checksum[:12]}")


def shape_of(entry: str) -> tuple[int, ...]:
    """Shape in an entry of a manifest, such as ``torch.float32 (2, 3) 9f3c...``."""
    numbers = entry[entry.index("(") + 1 : entry.index(")")].split(",")
    return tuple(int(number) for number in numbers if number.strip())


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
