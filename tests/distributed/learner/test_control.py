"""Ranks wait for rank 0 longer than any device collective may take: rollouts, evaluation, engine start, colocated."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import gloo
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from configs.load import load_config
from configs.schema import Config, ParallelConfig
from megatron_ext.learner import control
from megatron_ext.learner.model import distributed
from megatron_ext.sync.base import stage_weights
from megatron_ext.sync.disk import DiskSync
from recipes.loop import stream
from recipes.loop.metrics import StepMetrics

pytestmark = pytest.mark.distributed
LIMIT_S, SLOW_S = 2.0, 2.4  # of a collective on the device; of rank 0's work in the meantime


class SlowEngine:
    counters: dict[str, int] = {}
    sync_seconds: dict[str, float] = {}

    def __init__(self, parent: Path, by_all: bool) -> None:
        self.sync = DiskSync(parent)
        self.staging_root = self.sync.root if by_all else None

    def push(self, version: int, tensors: Iterator[tuple[str, Tensor]], ranks: Any = None) -> None:
        if version == 1:
            time.sleep(SLOW_S)  # a server is restarting
        assert (ranks is None) == (self.staging_root is None)
        stage_weights(self.sync, version, tensors, ranks=ranks)
        assert self.sync.info is not None
        names = ["rank 0", "rank 1"] if ranks else ["rank 0"]
        assert sorted(self.sync.info["tensors"]) == names and len(self.sync.info["files"]) == len(names)

    def sleep(self) -> None: ...

    def wake(self, tag: str) -> None: ...


class SlowCollector:
    def __init__(self, config: Config, root: Path, _: Path) -> None:
        self.engine = SlowEngine(root, by_all=config.rollout.colocated)

    def begin(self, step: int, position: int, count: int, carried: Sequence[int] = ()) -> None: ...

    def finish(self, step: int) -> dict[str, Any]:
        time.sleep(SLOW_S)
        return {"kind": "rollouts", "step": step, "position": 1, "groups": []}

    def evaluate(self, step: int) -> dict[str, Any]:
        time.sleep(SLOW_S)
        return {"kind": "eval", "step": step, "metrics": {"m": 0.5}}

    def close(self) -> None:
        self.engine.sync.close()


class Learner:
    """The learner's interface for the stream: an export that is a collective on the device."""

    device = torch.device("cpu")
    replica = 0

    def export(self, *, explicit_lm_head: bool, spread: bool = False) -> Iterator[tuple[str, Tensor]]:
        value = torch.ones(1)
        dist.all_reduce(value)
        if dist.get_rank() == 0 or spread:
            yield f"rank {dist.get_rank()}", value

    def offload(self, *, weights: bool = False) -> None: ...

    def reload(self, *, optimizer: bool | None = None) -> None: ...


def waits(rank: int, root: Path, config: Config) -> None:
    stream.Collector = SlowCollector  # type: ignore[misc, assignment]
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/store", rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT_S)
    )
    with distributed(ParallelConfig(), seed=0, timeout_s=LIMIT_S):
        learner: Any = Learner()
        for colocated in (False, True):
            config.rollout.colocated = colocated
            (root / str(colocated)).mkdir(exist_ok=True)
            with stream.RolloutStream(config, root, root / str(colocated), learner) as rollouts:
                begin = time.monotonic()
                record, _ = rollouts.next(1 + colocated, 0, StepMetrics(1))
                assert record["position"] == 1 and time.monotonic() - begin > SLOW_S
                assert colocated or rollouts.evaluate(3) == {"m": 0.5}
        control.barrier()
        with pytest.raises(RuntimeError):  # the timeout of the device's collectives takes effect
            if rank == 0:
                time.sleep(LIMIT_S + 1)
            dist.all_reduce(torch.ones(1))
            raise RuntimeError("rank 0 came late, and the other has gone")


def test_generation_may_be_slower_than_any_collective(tmp_path: Path) -> None:
    config = load_config(["recipe=quickstart", "rollout.engine=vllm"])
    gloo.run(2, waits, tmp_path, config, timeout_s=120)


def exchange(rank: int, root: Path) -> None:
    for number in range(2):  # a second default group in the same process gets a control group of its own
        with gloo.group(rank, 2, root / f"store-{number}"):
            for size in (0, 1, 1 << 20):
                sent = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
                assert control.broadcast_bytes(sent if rank == 1 else b"", src=1) == sent
                assert control.gather_bytes(sent[rank:]) == ([sent, sent[1:]] if rank == 0 else [])
            assert control.agree(rank == 0) and not control.agree(rank == 1)


def test_bytes_arrive_whole(tmp_path: Path) -> None:
    gloo.run(2, exchange, tmp_path, timeout_s=60)


def meet(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    with distributed(ParallelConfig(), seed=0, timeout_s=60):
        control.barrier()
        mine = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        if rank == 0:
            assert [address.ip for address in mine if address.port == port] == ["127.0.0.1"], mine
        control.barrier()


def test_ranks_meet_on_one_address_and_not_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    gloo.run(2, meet, port, timeout_s=60)
