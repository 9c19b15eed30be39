"""The pool's dispatch, retries and update control against stand-in servers; its real servers are in tests/e2e."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from megatron_ext.sync.base import WeightUpdateError
from recipes.rollout import Sampling
from recipes.vllm_pool import PoolOptions, ServerError, VLLMPool, parse_choice, request_seed
from recipes.vllm_server import ServerOptions, kv_cache_need, server_command, server_environment

WEIGHTS = {"w": torch.arange(6.0)}


class StandIn:
    """Answers like one vLLM server. ``fault`` maps a path to "hang", "500", "disconnect" or "ignore"."""

    def __init__(self, label: str = "default") -> None:
        self.fault: dict[str, str] = {}
        self.label = label
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.loaded: dict[str, Any] = {"version": None, "checksum": None}
        self.cache_reset = True
        self.busy = self.most_busy = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._ready.wait()

    def _serve(self) -> None:
        async def start() -> None:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", self._answer)
            runner = web.AppRunner(app, shutdown_timeout=0)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = site.name
            self._ready.set()

        self._loop.run_until_complete(start())
        self.url = self.url.rstrip("/")
        self._loop.run_forever()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _answer(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer secret"
        path = request.path
        body = await request.json() if request.can_read_body else {}
        if path not in ("/health", "/weight_info"):
            self.calls.append(path)
        match self.fault.get(path):
            case "hang":
                await asyncio.sleep(30)
            case "500":
                return web.Response(status=500, text="engine dead")
            case "disconnect":
                assert request.transport is not None
                request.transport.close()
        if path == "/weight_info":
            return web.json_response({"weight_version": self.label})
        if path == "/update_weight_version":
            self.label = body["new_version"]
        if path == "/update_weights" and path not in self.fault:
            self.loaded = {key: body["update_info"][key] for key in ("version", "checksum")}
        if path == "/finish_weight_update":
            self.label = body["weight_version"]
        if path == "/collective_rpc":
            return web.json_response({"results": [self.loaded]})
        if path == "/reset_prefix_cache":
            return web.json_response({"success": self.cache_reset})
        if path == "/inference/v1/generate":
            return await self._generate(body)
        return web.json_response({})

    async def _generate(self, body: dict[str, Any]) -> web.Response:
        self.bodies.append(body)
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        await asyncio.sleep(0.01)
        self.busy -= 1
        choice = {
            "token_ids": [body["token_ids"][0], 1],
            "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -0.25}]},
            "finish_reason": "length",
            "weight_versions": [{"version": self.label, "start": 0, "end": 2}],
        }
        return web.json_response({"choices": [choice] * body["sampling_params"]["n"]})


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    return tmp_path


@pytest.fixture
def stand_ins() -> Iterator[list[StandIn]]:
    servers = [StandIn(), StandIn()]
    yield servers
    for server in servers:
        server.stop()


def make_pool(
    servers: list[StandIn], model_dir: Path, monkeypatch: pytest.MonkeyPatch, *, max_num_seqs: int = 8
) -> VLLMPool:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    options = PoolOptions(request_timeout_s=1.5, update_timeout_s=0.8, start_timeout_s=5, sync_dir=model_dir / "sync")
    server = ServerOptions(model_dir, max_model_len=32, max_num_seqs=max_num_seqs, dtype="float32")
    return VLLMPool(server, options, num_servers=0, urls=[s.url for s in servers], log_dir=model_dir)


@pytest.fixture
def pool(stand_ins: list[StandIn], model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VLLMPool]:
    engine = make_pool(stand_ins, model_dir, monkeypatch)
    for server in stand_ins:
        server.calls.clear()
        server.bodies.clear()
    yield engine
    engine.close()


def prompts(count: int) -> list[list[int]]:
    return [[10 + index, 3, 4] for index in range(count)]


def test_order_spread_and_bound(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    rollouts = pool.generate(prompts(40), n=4, sampling=Sampling(5), seeds=range(40))
    assert [r.response_ids[0] for r in rollouts] == [10 + index for index in range(40) for _ in range(4)]
    assert [len(server.bodies) for server in stand_ins] == [20, 20]
    assert max(server.most_busy for server in stand_ins) <= 4, "2 x max_num_seqs / n requests per server"


def test_request_carries_what_it_must(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    pool.generate([[7] * 30], n=2, sampling=Sampling(5, stop_token_ids=(9,)), seeds=[3])
    params = (stand_ins[0].bodies + stand_ins[1].bodies)[0]["sampling_params"]
    assert params["stop_token_ids"] == [2, 9] and params["ignore_eos"] is True
    assert params["max_tokens"] == 2, "32 tokens of context, 30 of prompt"
    assert params["temperature"] == params["top_p"] == 1.0 and params["n"] == 2


def test_more_samples_than_a_server_decodes(stand_ins: list[StandIn], model_dir: Path, monkeypatch: Any) -> None:
    pool = make_pool(stand_ins, model_dir, monkeypatch, max_num_seqs=3)
    stand_ins[0].bodies.clear()
    stand_ins[1].bodies.clear()
    assert len(pool.generate(prompts(1), n=8, sampling=Sampling(5), seeds=[0])) == 8
    asked = [b["sampling_params"] for server in stand_ins for b in server.bodies]
    assert sorted(p["n"] for p in asked) == [2, 3, 3] and len({p["seed"] for p in asked}) == 3
    pool.close()


@pytest.mark.parametrize("fault", ["hang", "500", "disconnect"])
def test_failing_server_is_replaced_once(pool: VLLMPool, stand_ins: list[StandIn], fault: str) -> None:
    stand_ins[0].fault["/inference/v1/generate"] = fault
    start = time.perf_counter()
    rollouts = pool.generate(prompts(6), n=2, sampling=Sampling(5), seeds=range(6))
    assert len(rollouts) == 12 and time.perf_counter() - start < 3
    assert pool.counters == {"requests": 6, "retries": 3, "server_failures": 1}
    stand_ins[0].bodies.clear()
    pool.generate(prompts(6), n=2, sampling=Sampling(5), seeds=range(6))
    assert not stand_ins[0].bodies, "not used again before a weight update"
    stand_ins[0].fault.clear()
    pool.push(1, WEIGHTS.items())
    pool.generate(prompts(6), n=2, sampling=Sampling(5), seeds=range(6))
    assert len(stand_ins[0].bodies) == 3


def test_both_servers_fail(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    for server in stand_ins:
        server.fault["/inference/v1/generate"] = "500"
    with pytest.raises(ServerError, match="engine dead|no usable"):
        pool.generate(prompts(4), n=2, sampling=Sampling(5), seeds=range(4))


def test_update_phases_in_order_then_the_new_version(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    pool.push(7, WEIGHTS.items())
    phases = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    for server in stand_ins:
        assert server.calls == [*phases, "/collective_rpc", "/reset_prefix_cache", "/resume"]
    rollouts = pool.generate(prompts(2), n=1, sampling=Sampling(5), seeds=[0, 1])
    assert pool.version == 7 and all(r.weight_versions == [7, 7] for r in rollouts)


@pytest.mark.parametrize("phase", ["/pause", "/update_weights", "/finish_weight_update", "/resume", "stale", "cache"])
def test_broken_update_raises_in_time_and_serves_nothing(pool: VLLMPool, stand_ins: list[StandIn], phase: str) -> None:
    if phase == "stale":  # the server says yes and keeps the old weights
        stand_ins[1].fault["/update_weights"] = "ignore"
    elif phase == "cache":
        stand_ins[1].cache_reset = False
    else:
        stand_ins[1].fault[phase] = "hang"
    start = time.perf_counter()
    with pytest.raises(WeightUpdateError):
        pool.push(1, WEIGHTS.items())
    assert time.perf_counter() - start < 3 and pool.version == 0
    with pytest.raises(ServerError, match="no usable rollout server"):
        pool.generate(prompts(1), n=1, sampling=Sampling(5), seeds=[0])


def test_staged_weights_are_removed(pool: VLLMPool, stand_ins: list[StandIn], model_dir: Path) -> None:
    pool.push(1, WEIGHTS.items())
    stand_ins[0].fault["/update_weights"] = "500"
    with pytest.raises(WeightUpdateError):
        pool.push(2, WEIGHTS.items())
    assert not list((model_dir / "sync").rglob("*.safetensors"))
    pool.close()
    assert not list((model_dir / "sync").iterdir())


def test_servers_with_another_runs_weights_wait_for_an_update(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = StandIn(label="41")
    pool = make_pool([old], model_dir, monkeypatch)
    with pytest.raises(ServerError, match="no usable"):
        pool.generate(prompts(1), n=1, sampling=Sampling(5), seeds=[0])
    pool.push(3, WEIGHTS.items())
    assert pool.generate(prompts(1), n=1, sampling=Sampling(5), seeds=[0])[0].weight_versions == [3, 3]
    pool.close()
    old.stop()


def test_generate_from_a_worker_thread_excludes_push(pool: VLLMPool) -> None:
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(pool.generate, prompts(40), n=4, sampling=Sampling(5), seeds=range(40))
        while not any(server.in_flight for server in pool.servers):
            time.sleep(0.001)
        with pytest.raises(RuntimeError, match=r"push\(\) while generate"):
            pool.push(1, WEIGHTS.items())
        assert len(future.result()) == 160
    pool.push(1, WEIGHTS.items())


def test_bad_requests_are_the_callers_fault(pool: VLLMPool) -> None:
    with pytest.raises(ValueError, match="one seed per prompt"):
        pool.generate(prompts(2), n=1, sampling=Sampling(5), seeds=[0])
    with pytest.raises(ValueError, match="n=0"):
        pool.generate(prompts(1), n=0, sampling=Sampling(5), seeds=[0])
    greedy = Sampling(5, temperature=0, allow_off_policy_sampling=True)
    with pytest.raises(ValueError, match="use n=1"):
        pool.generate(prompts(1), n=2, sampling=greedy, seeds=[0])


def test_urls_need_a_token(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    server = ServerOptions(model_dir, max_model_len=32, max_num_seqs=8, dtype="float32")
    with pytest.raises(ValueError, match="VLLM_API_KEY"):
        VLLMPool(server, PoolOptions(), num_servers=0, urls=["http://127.0.0.1:1"], log_dir=model_dir)


def test_parse_choice_labels_every_token_and_refuses_torn_answers() -> None:
    choice: dict[str, Any] = {
        "token_ids": [4, 5, 6],
        "logprobs": {"content": [{"logprob": -0.1}, {"logprob": -0.2}, {"logprob": -0.3}]},
        "finish_reason": "stop",
        "weight_versions": [{"version": "2", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": 3}],
    }
    rollout = parse_choice([1], choice)
    assert rollout.weight_versions == [2, 3, 3] and rollout.logprobs == [-0.1, -0.2, -0.3]
    for change in ({"finish_reason": "abort"}, {"weight_versions": None}, {"token_ids": [4]}):
        with pytest.raises(ServerError, match="incomplete response"):
            parse_choice([1], choice | change)
    nan = choice | {"logprobs": {"content": [{"logprob": -9999.0}] * 3}}
    with pytest.raises(ServerError, match="NaN"):
        parse_choice([1], nan)


def test_request_seeds_of_neighbours_are_far_apart() -> None:
    seeds = sorted(request_seed(seed, first) for seed in range(1000) for first in (0, 8))
    assert 0 <= seeds[0] and seeds[-1] < 2**62
    assert min(b - a for a, b in zip(seeds, seeds[1:], strict=False)) > 1024, "vLLM adds the sample's index"


def test_command_and_environment(model_dir: Path) -> None:
    options = ServerOptions(model_dir, 32, 8, "float32", kv_cache_bytes=1 << 26)
    command = " ".join(server_command(options, 4711))
    assert "--host 127.0.0.1 --port 4711" in command and "--no-enable-chunked-prefill" in command
    assert "--host 10.1.2.3 --port 4711" in " ".join(server_command(options, 4711, "10.1.2.3"))
    for everywhere in ("0.0.0.0", "::", ""):
        with pytest.raises(ValueError, match="every network"):
            server_command(options, 4711, everywhere)
    base = {"RANK": "3", "MASTER_ADDR": "h", "TORCHELASTIC_RUN_ID": "x", "HOME": "/h", "OMP_NUM_THREADS": "9"}
    environment = server_environment(base, 0, "secret")
    assert "secret" not in command and environment["VLLM_API_KEY"] == "secret"
    assert environment["HOME"] == "/h" and environment["OMP_NUM_THREADS"] == "1"
    assert not environment.keys() & {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"}


def test_kv_cache_holds_all_sequences(model_dir: Path) -> None:
    config = '{"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}'
    (model_dir / "config.json").write_text(config)
    # keys and values, 4 layers, 1 head of 32, 4 bytes: 1024 bytes per token; 1000 tokens x 256 sequences
    assert kv_cache_need(ServerOptions(model_dir, 1000, 256, "float32")) == 1024 * 1000 * 256
    assert kv_cache_need(ServerOptions(model_dir, 1000, 1, "float32")) == 64 << 20
    assert kv_cache_need(ServerOptions(model_dir, 100000, 256, "float32")) == 1 << 30
