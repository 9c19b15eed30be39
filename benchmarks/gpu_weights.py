"""Weights from one process to another on one GPU: shared memory (ipc) beside files in /dev/shm, stage by stage.

    python -m benchmarks.gpu_weights [--shape qwen2.5-0.5b qwen2.5-7b] [--turns 3] [--json OUT]
    python -m benchmarks.gpu_weights --tiny      a small shape; without a GPU, where the figures mean little

Two processes without vLLM, as in `benchmarks.weight_sync`: one stages random weights in bfloat16, the other checks them
and copies them into existing parameters. One line of JSON per measurement. Seconds are medians, the first update apart,
because it takes memory. ``times_memcpy`` compares an update with one copy of the same bytes on the device.

Parts of each shape: "memcpy" (copy on the device), "bus" (between device and host, pageable and pinned memory, each
way), "hash" (the digests of an update), "ipc", "files", and "pinned": staging for a broadcast, without the broadcast.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.weight_sync import SHAPES, sizes_of
from megatron_ext.sync.base import Clock, WeightDigest, stage_weights
from megatron_ext.sync.broadcast import BroadcastSync
from megatron_ext.sync.disk import DiskSync
from megatron_ext.sync.ipc import IpcSync, problem
from megatron_ext.sync.receive import UPLOAD_BYTES, Update, Upload, read_shared, read_verified

TINY = "tiny"
BUS_BYTES = 1 << 30  # moved at a time by "bus"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, call: Callable[[], Any], turns: int) -> float:
    """Median seconds, after one call that is not counted."""
    call()
    found = []
    for _ in range(turns):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def weights(shape: str, device: torch.device) -> dict[str, Tensor]:
    sizes = sizes_of(shape)
    return {name: torch.randn(size, device=device, dtype=torch.bfloat16) for name, size in sizes.items()}


def receiver(pipe: Any, shape: str, device: torch.device) -> None:
    """A worker that checks weights and copies them into its parameters."""
    torch.set_num_threads(1)
    sizes = sizes_of(shape)
    parameters = {name: torch.zeros(size, device=device, dtype=torch.bfloat16) for name, size in sizes.items()}
    wait(device)
    pipe.send("ready")
    while (body := pipe.recv()) is not None:
        seconds: dict[str, float] = {}
        try:
            load(Update(**body), parameters, device, Clock(seconds))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
            raise
        pipe.send(seconds)


def load(info: Update, parameters: dict[str, Tensor], device: torch.device, clock: Clock) -> None:
    found = read_shared(info, device, clock) if info.socket else read_verified(info, clock)
    upload = Upload(device) if device.type == "cuda" and not info.socket else None
    for name, tensor in found.items():
        small = upload is not None and tensor.nbytes <= UPLOAD_BYTES
        parameters[name].copy_(upload(tensor) if upload is not None and small else tensor)
    wait(device)
    clock.lap("load")


@contextmanager
def peer(shape: str, device: torch.device) -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=receiver, args=(its, shape, device), daemon=True)
    process.start()
    its.close()
    try:
        assert mine.recv() == "ready"
        yield mine
        mine.send(None)
        process.join(60)
    finally:
        if process.is_alive():
            process.kill()


def update(sync: Any, pipe: Any, version: int, tensors: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    wait(device)
    begin = time.perf_counter()
    seconds: dict[str, float] = {}
    stage_weights(sync, version, tensors.items(), seconds)
    staged = time.perf_counter()
    pipe.send(sync.info)
    answer = pipe.recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    seconds |= {f"worker_{name}": value for name, value in answer.items()}
    done = time.perf_counter()
    return seconds | {"staged": staged - begin, "delivered": done - staged, "all": done - begin}


def transfers(name: str, shape: str, device: torch.device, turns: int) -> Iterator[dict[str, Any]]:
    """Updates by one transport, the first one apart."""
    tensors = weights(shape, device)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    sync: Any = IpcSync(device) if name == "ipc" else DiskSync(need_bytes=nbytes)
    try:
        with peer(shape, device) as pipe:
            rows = [update(sync, pipe, turn, tensors, device) for turn in range(turns + 1)]
    finally:
        sync.close()
    middle = {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}
    yield {"part": name, "digest": sync.digest, "first_update_s": rounded(rows[0]), "seconds": rounded(middle)} | {
        "GB_s": round(nbytes / middle["all"] / 1e9, 2),
        **({"directory": str(sync.root.parent)} if name == "files" else {}),
    }


def pinned(shape: str, device: torch.device, turns: int) -> Iterator[dict[str, Any]]:
    """Staging of a broadcast: copies into pinned buckets, and the digest where the tensors are."""
    tensors = weights(shape, device)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    sync = BroadcastSync("nccl", device)
    rows = []
    for version in range(turns + 1):
        wait(device)
        begin = time.perf_counter()
        stage_weights(sync, version, tensors.items())
        rows.append(time.perf_counter() - begin)
    sync.close()
    middle = statistics.median(rows[1:])
    yield {
        "part": "pinned",
        "digest": sync.digest,
        "first_update_s": round(rows[0], 4),
        "seconds": round(middle, 4),
    } | {"GB_s": round(nbytes / middle / 1e9, 2)}


def bus(device: torch.device, nbytes: int, turns: int) -> dict[str, Any]:
    """GB/s between device and host."""
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    found = {}
    for kind in ("pageable", "pinned"):
        here = torch.ones(nbytes, dtype=torch.uint8, pin_memory=kind == "pinned" and device.type == "cuda")
        for way, call in (
            ("to_host", lambda here=here: here.copy_(there, non_blocking=True)),
            ("to_device", lambda here=here: there.copy_(here, non_blocking=True)),
        ):
            found[f"{kind}_{way}"] = round(nbytes / timed(device, call, turns) / 1e9, 2)
    return {"part": "bus", "GB_s": found}


def reference(shape: str, device: torch.device, turns: int) -> Iterator[dict[str, Any]]:
    """One copy on the device, and the digests, of these tensors."""
    tensors = weights(shape, device)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    copies = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}

    def copy() -> None:
        for name, tensor in tensors.items():
            copies[name].copy_(tensor)

    seconds = timed(device, copy, turns)
    yield {"part": "memcpy", "seconds": round(seconds, 5), "GB_s": round(nbytes / seconds / 1e9, 1)}
    copies.clear()

    def digest(kind: str) -> None:
        found = WeightDigest(kind)
        for name, tensor in tensors.items():
            found.add(name, tensor)
        found.hexdigest()

    kind = "lanes" if device.type == "cuda" else "xxh3"
    seconds = timed(device, lambda: digest(kind), turns)
    yield {"part": "hash", "digest": kind, "seconds": round(seconds, 5), "GB_s": round(nbytes / seconds / 1e9, 1)}


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in seconds.items()}


def measure(shape: str, device: torch.device, turns: int) -> Iterator[dict[str, Any]]:
    """Every part of one shape. A part that fails is a row with its error, and the others go on."""
    nbytes = 2 * sum(torch.Size(size).numel() for size in sizes_of(shape).values())
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "reference": lambda: reference(shape, device, turns),
        "bus": lambda: iter([bus(device, min(BUS_BYTES, nbytes), turns)]),
        "ipc": lambda: transfers("ipc", shape, device, turns),
        "pinned": lambda: pinned(shape, device, turns),
        "files": lambda: transfers("files", shape, device, min(turns, 2)),
    }
    memcpy = 0.0
    for name, part in parts.items():
        if name == "files" and (room := shutil.disk_usage("/dev/shm").free) < 1.1 * nbytes:
            yield {"part": name, "shape": shape, "skipped": f"/dev/shm has {room / 1e9:.1f} GB of {nbytes / 1e9:.1f}"}
            continue
        if name == "pinned" and device.type != "cuda":
            continue
        try:
            for row in part():
                memcpy = row["seconds"] if row["part"] == "memcpy" else memcpy
                if memcpy and name in ("ipc", "files"):
                    row["times_memcpy"] = round(row["seconds"]["all"] / memcpy, 2)
                yield {"shape": shape, "MB": round(nbytes / 1e6, 1)} | row
        except Exception as error:
            yield {"part": name, "shape": shape, "error": f"{type(error).__name__}: {error}"[:500]}
        if device.type == "cuda":
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["qwen2.5-0.5b", "qwen2.5-7b"], choices=list(SHAPES))
    parser.add_argument("--tiny", action="store_true", help="one small shape")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all lines to this file too, as they are measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.error("there is no GPU here: add --tiny")
    lines: list[str] = []

    def show(row: dict[str, Any]) -> None:
        lines.append(json.dumps(row))
        print(lines[-1], flush=True)
        if options.json:
            options.json.write_text("\n".join(lines) + "\n")

    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    show({"date": str(date.today()), "device": card, "torch": torch.__version__, "cores": os.cpu_count()})
    begin = time.perf_counter()
    why = problem(device)
    show({"part": "probe", "ipc_works": why is None, "why_not": why, "seconds": round(time.perf_counter() - begin, 1)})
    for shape in [TINY] if options.tiny else options.shape:
        for row in measure(shape, device, options.turns):
            show(row)
    show({"seconds_in_total": round(time.perf_counter() - begin, 1)})


if __name__ == "__main__":
    main()
