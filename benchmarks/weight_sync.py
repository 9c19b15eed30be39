"""Seconds of a weight update, stage by stage, into receivers that only check and load: no vLLM, no HTTP.

    python -m benchmarks.weight_sync [--shape smollm2-135m qwen2.5-0.5b] [--dtype float32] [--receivers 1] [--json OUT]
    python -m benchmarks.weight_sync --server DIR [--dtype float32]     a running vLLM server of that model is refreshed

Each row is compared with two measurements of the same bytes in the same run, taken between the updates: one copy in
memory into mapped pages (memcpy), and one transfer through a loopback TCP connection to another process (network).
With vLLM installed, its own packed broadcast runs beside ours, over the same gloo group and without a checksum. Copies
per byte are counted in the code, on the host: `docs/rollout.md` has the table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

SHAPES = {  # hidden, intermediate, layers, key-value width, vocabulary
    "tiny": (64, 128, 4, 32, 512),
    "smollm2-135m": (576, 1536, 30, 192, 49152),
    "qwen2.5-0.5b": (896, 4864, 24, 128, 151936),
    "qwen2.5-7b": (3584, 18944, 28, 512, 152064),
}
UNTIED = ("qwen2.5-7b",)


def sizes_of(shape: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama-like model's tensors, without its few biases."""
    hidden, inner, layers, kv, vocabulary = SHAPES[shape]
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        sizes |= {f"{at}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        sizes |= {f"{at}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qo"}
        sizes |= {f"{at}.self_attn.{p}_proj.weight": (kv, hidden) for p in "kv"}
        sizes |= {f"{at}.mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        sizes |= {f"{at}.mlp.down_proj.weight": (hidden, inner)}
    if shape in UNTIED:
        sizes["lm_head.weight"] = (vocabulary, hidden)
    return sizes


def weights(shape: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random tensors of these shapes."""
    return {name: torch.randn(size).to(dtype) for name, size in sizes_of(shape).items()}


def receiver(pipe: Any, sizes: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """A worker that copies received and verified weights into its parameters."""
    from megatron_ext.sync.base import Clock, WeightDigest
    from megatron_ext.sync.broadcast import Rendezvous, join_group
    from megatron_ext.sync.buckets import Entry
    from megatron_ext.sync.receive import Update, read_shared, read_verified, receive_buckets, verify

    torch.set_num_threads(1)
    parameters = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in sizes.items()}
    group: Any = None
    while (message := pipe.recv()) is not None:
        kind, body = message
        if kind == "join":
            group = join_group(Rendezvous(**body), body["rank"])
        elif kind == "update":
            info = Update(**body)
            seconds: dict[str, float] = {}
            clock = Clock(seconds)
            if info.files or info.socket:
                device = torch.device("cpu")
                found = read_shared(info, device, clock) if info.socket else read_verified(info, clock)
                for name, tensor in found.items():
                    parameters[name].copy_(tensor)
                clock.lap("load")
            else:
                digest = WeightDigest(info.digest)
                entries = [[Entry(**entry) for entry in part] for part in info.buckets]
                for part in receive_buckets(group, entries, torch.device("cpu"), 60.0):
                    clock.lap("receive")
                    for name, tensor in part.items():
                        digest.add(name, tensor)
                    clock.lap("check")
                    for name, tensor in part.items():
                        parameters[name].copy_(tensor)
                    clock.lap("load")
                verify(digest, info)
            pipe.send(seconds)
        elif kind == "vllm":
            with vllm_broadcast(group) as (packed, communicator):
                packed.packed_nccl_broadcast_consumer(
                    ((name, (list(size), dtype)) for name, (size, dtype) in sizes.items()),
                    communicator,
                    0,
                    lambda part: [parameters[name].copy_(tensor) for name, tensor in part],
                    device="cpu",
                )
            pipe.send({})
        elif kind == "drain":
            with socket.create_connection(body[:2]) as connection:
                buffer, left = bytearray(1 << 20), body[2]
                while left:
                    left -= connection.recv_into(buffer)
            pipe.send({})


@contextmanager
def vllm_broadcast(group: Any) -> Iterator[tuple[Any, Any]]:
    """vLLM's packed broadcast, of its example of weight transfer, on CPUs: over gloo, and without streams.

    It has no checksum. Two buffers of 1 GiB are its default.
    """
    from vllm.distributed.weight_transfer import packed_tensor

    from megatron_ext.sync.broadcast import broadcast

    communicator = SimpleNamespace(broadcast=lambda tensor, src: broadcast(group, tensor, 60.0))
    idle = SimpleNamespace(synchronize=lambda: None)
    with (
        mock.patch.object(packed_tensor, "_get_streams", lambda _, count: (idle,) * count),
        mock.patch.object(torch.cuda, "stream", lambda _: nullcontext()),
        mock.patch.object(torch.accelerator, "current_device_index", lambda: 0),
    ):
        yield packed_tensor, communicator


def vllm_update(group: Any, pipes: list[Any], tensors: dict[str, Tensor]) -> dict[str, float]:
    begin = time.perf_counter()
    for pipe in pipes:
        pipe.send(("vllm", None))
    with vllm_broadcast(group) as (packed, communicator):
        packed.packed_nccl_broadcast_producer(iter(tensors.items()), communicator, 0, lambda item: item[1])
    for pipe in pipes:
        pipe.recv()
    return {"all": time.perf_counter() - begin}


def network(pipe: Any, data: Tensor) -> float:
    """Seconds for one transfer of these bytes to the receiver through a loopback connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(("drain", (*listener.getsockname(), data.nbytes)))
        connection, _ = listener.accept()
        with connection:
            begin = time.perf_counter()
            connection.sendall(data.numpy().data)
            pipe.recv()
    return time.perf_counter() - begin


def update(sync: Any, pipes: list[Any], version: int, tensors: dict[str, Tensor]) -> dict[str, float]:
    from megatron_ext.sync.base import stage_weights

    begin = time.perf_counter()
    seconds: dict[str, float] = {}
    stage_weights(sync, version, tensors.items(), seconds)
    staged = time.perf_counter()
    for pipe in pipes:
        pipe.send(("update", sync.info))
    sync.feed()
    for pipe in pipes:
        for name, value in pipe.recv().items():
            seconds[name] = max(value, seconds.get(name, 0.0))
    return seconds | {
        "staged": staged - begin,
        "delivered": time.perf_counter() - staged,
        "all": time.perf_counter() - begin,
    }


def measure(shape: str, dtype: torch.dtype, receivers: int, turns: int) -> Iterator[dict[str, Any]]:
    from megatron_ext.sync.broadcast import BroadcastSync
    from megatron_ext.sync.disk import DiskSync
    from megatron_ext.sync.ipc import IpcSync

    tensors = weights(shape, dtype)
    nbytes = sum(t.nbytes for t in tensors.values())
    sizes = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(receivers):
        mine, its = context.Pipe()
        processes.append(context.Process(target=receiver, args=(its, sizes), daemon=True))
        processes[-1].start()
        pipes.append(mine)
    flat, copy = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    gloo = BroadcastSync("gloo")
    bodies = gloo.connect(["http://127.0.0.1:80"] * receivers, [1] * receivers, 60.0)
    for pipe, body in zip(pipes, bodies, strict=True):
        pipe.send(("join", body))
    gloo.join()
    transports: dict[str, Any] = {"disk": DiskSync(need_bytes=2 * nbytes), "ipc": IpcSync(torch.device("cpu"))}
    transports |= {"vllm packed, gloo": None} if importlib.util.find_spec("vllm") else {}
    for name, sync in (transports | {"gloo": gloo}).items():
        rows: list[dict[str, float]] = []
        for turn in range(turns + 1):
            begin = time.perf_counter()
            copy.copy_(flat)
            references = {"memcpy": time.perf_counter() - begin, "network": network(pipes[0], flat)}
            row = update(sync, pipes, turn, tensors) if sync else vllm_update(gloo._group, pipes, tensors)
            if turn:  # the first one allocates memory
                rows.append(row | references)
        if sync is not None:
            sync.close()
        best = {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}
        floor = best["memcpy"] + best["network"]
        yield {
            "shape": shape,
            "dtype": str(dtype),
            "MB": nbytes // 10**6,
            "transport": name,
            "receivers": receivers,
        } | {
            "seconds": best,
            "times_memcpy_plus_network": round(best["all"] / floor, 2),
        }
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join()


def refresh(directory: Path, dtype: str, turns: int) -> Iterator[dict[str, Any]]:
    """Update a real server through the pool."""
    from safetensors.torch import load_file

    from configs.schema import RolloutConfig
    from recipes.rollout.make import make_engine

    tensors = {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}
    for transport in ("disk", "ipc", "gloo"):
        with tempfile.TemporaryDirectory() as logs:
            limits: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 16, "dtype": dtype}
            rollout = RolloutConfig(engine="vllm", weight_sync=transport, **limits)
            pool = make_engine(rollout, directory, Path(logs))
            try:
                rows = []
                for turn in range(turns + 1):
                    for tensor in tensors.values():  # as training does: no layer stays what it was
                        tensor.reshape(-1)[:1] += 1
                    begin = time.perf_counter()
                    pool.push(turn + 1, tensors.items())
                    if turn:
                        rows.append(pool.sync_seconds | {"all": time.perf_counter() - begin})
            finally:
                pool.close()
        yield {
            "server": directory.name,
            "dtype": dtype,
            "transport": transport,
            "MB": sum(t.numel() for t in tensors.values()) * getattr(torch, dtype).itemsize // 10**6,
        } | {"seconds": {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["smollm2-135m", "qwen2.5-0.5b"], choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--receivers", type=int, default=1)
    parser.add_argument("--server", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.server:
        rows = list(refresh(options.server, options.dtype, options.turns))
    else:
        dtype = getattr(torch, options.dtype)
        rows = [row for shape in options.shape for row in measure(shape, dtype, options.receivers, options.turns)]
    report = {"date": str(date.today()), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "rows": rows}
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
