"""The pool's dispatch, retries, updates and revivals against stand-in servers; its real servers are in tests/e2e."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from megatron_ext.sync.base import WeightUpdateError
from recipes import vllm_fleet
from recipes.rollout import Sampling
from recipes.vllm_client import Line, ServerError, parse_choice, request_seed
from recipes.vllm_pool import PoolOptions, VLLMPool
from recipes.vllm_server import (
    ServerOptions,
    gpu_environment,
    kv_cache_need,
    server_command,
    server_environment,
    server_gpus,
)

WEIGHTS = {"w": torch.arange(6.0)}


class StandIn:
    """Answers like one vLLM server. ``fault`` maps a path, or "*", to "hang", "500", "disconnect" or "ignore"."""

    def __init__(self, label: str = "default") -> None:
        self.fault: dict[str, str] = {}
        self.label = label
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.loaded: dict[str, Any] = {"version": None, "checksum": None}
        self.cache_reset = True
        self.busy = self.most_busy = 0
        self.tokens_s = 0.01  # for one response
        self.paused = ""
        self._resumed, self._cut_off = asyncio.Event(), asyncio.Event()
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
        async def end() -> None:
            hanging = asyncio.all_tasks() - {asyncio.current_task()}
            for task in hanging:
                task.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _answer(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer secret"
        path = request.path
        body = await request.json() if request.can_read_body else {}
        if path not in ("/health", "/is_paused"):
            self.calls.append(path)
        if "poison" in self.fault and body.get("token_ids") == [77, 3, 4]:
            return web.Response(status=500, text="engine dead")
        match self.fault.get(path, self.fault.get("*")):
            case "hang":
                await asyncio.sleep(30)
            case "500":
                return web.Response(status=500, text="engine dead")
            case "disconnect":
                assert request.transport is not None
                request.transport.close()
        if path == "/pause":
            self.paused, self._resumed = request.query["mode"], asyncio.Event()
            self._cut_off.set()
        if path == "/resume":
            self.paused, self._cut_off = "", asyncio.Event()
            self._resumed.set()
        if path == "/get_world_size":
            return web.json_response({"world_size": 1})
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
        """Two tokens: the prompt's first, and the number of tokens of context. An update may come between them."""
        self.bodies.append(body)
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        context, most = body["token_ids"], body["sampling_params"]["max_tokens"]
        tokens, labels = [context[0]], [self.label]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._cut_off.wait(), self.tokens_s)
        reason = "abort" if self.paused == "abort" else "length"
        if self.paused == "keep":
            await self._resumed.wait()
        if reason == "length" and most > 1:
            tokens.append(len(context))
            labels.append(self.label)
        self.busy -= 1
        choice = {
            "token_ids": tokens,
            "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -0.25}][: len(tokens)]},
            "finish_reason": reason,
            "weight_versions": [{"version": label, "start": i, "end": i + 1} for i, label in enumerate(labels)],
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
    servers: list[StandIn], model_dir: Path, monkeypatch: pytest.MonkeyPatch, *, max_num_seqs: int = 8, **changed: Any
) -> VLLMPool:
    """A pool with short time limits, whose servers hold version 0."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setattr(vllm_fleet, "FIRST_PAUSE_S", 0.05)
    limits: dict[str, Any] = {"request_timeout_s": 20, "update_timeout_s": 0.8, "start_timeout_s": 5, "probe_s": 0.6}
    limits |= {"revive_timeout_s": 1.0, "sync_dir": model_dir / "sync"} | changed
    server = ServerOptions(model_dir, max_model_len=32, max_num_seqs=max_num_seqs, dtype="float32")
    pool = VLLMPool(server, PoolOptions(**limits), num_servers=0, urls=[s.url for s in servers], log_dir=model_dir)
    pool.push(0, WEIGHTS.items())
    return pool


@pytest.fixture
def pool(stand_ins: list[StandIn], model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VLLMPool]:
    engine = make_pool(stand_ins, model_dir, monkeypatch)
    for server in stand_ins:
        server.calls.clear()
        server.bodies.clear()
    yield engine
    engine.close()


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


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
def test_requests_of_a_failing_server_go_elsewhere_and_it_comes_back(
    pool: VLLMPool, stand_ins: list[StandIn], fault: str
) -> None:
    """A hanging server is found by asking its engine, long before the requests' own time limit."""
    stand_ins[0].fault["*" if fault == "hang" else "/inference/v1/generate"] = fault
    start = time.perf_counter()
    rollouts = pool.generate(prompts(6), n=2, sampling=Sampling(5), seeds=range(6))
    assert len(rollouts) == 12 and time.perf_counter() - start < 8
    assert pool.counters["retries"] == 3 and pool.counters["server_failures"] == 1 and pool.counters["revived"] == 0
    assert not pool.servers[0].usable
    stand_ins[0].fault.clear()
    stand_ins[0].label = "default"  # restarted behind our back
    wait_until(lambda: pool.servers[0].usable, "it must come back")
    assert pool.counters["revived"] == 1
    stand_ins[0].bodies.clear()
    again = pool.generate(prompts(6), n=2, sampling=Sampling(5), seeds=range(6))
    assert len(stand_ins[0].bodies) == 3 and {v for r in again for v in r.weight_versions} == {0}


def test_a_server_with_other_weights_is_found_by_its_answer(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    """Restarted between two requests, at the same address, and alive at once: only the label tells."""
    stand_ins[0].label = "default"
    rollouts = pool.generate(prompts(6), n=2, sampling=Sampling(5), seeds=range(6))
    assert len(rollouts) == 12 and pool.counters["server_failures"] == 1
    assert {v for r in rollouts for v in r.weight_versions} == {0}
    wait_until(lambda: pool.servers[0].usable, "it gets the weights again")
    assert stand_ins[0].label == stand_ins[1].label


def test_a_prompt_that_fails_everywhere_is_named(stand_ins: list[StandIn], model_dir: Path, monkeypatch: Any) -> None:
    pool = make_pool(stand_ins, model_dir, monkeypatch, revive_timeout_s=5.0)
    for server in stand_ins:
        server.fault["/inference/v1/generate"] = "500"

    def recover() -> None:  # the probe of a revival must succeed, the request fail again
        for server in stand_ins:
            server.fault.clear()
            server.fault["poison"] = "500"

    threading.Timer(0.2, recover).start()
    with pytest.raises(ServerError, match=r"3 tokens of prompt, \[77, 3, 4\].*failed on 3 servers.*HTTP 500"):
        pool.generate([[77, 3, 4]], n=2, sampling=Sampling(5), seeds=[0])
    pool.close()


def test_nobody_left(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    """Waits for a revival as long as it may, then says so in one sentence."""
    for server in stand_ins:
        server.fault["*"] = "500"
    start = time.perf_counter()
    with pytest.raises(
        ServerError, match=r"no usable rollout server came back within 1 s \(rollout.revive_timeout_s\)"
    ):
        pool.generate(prompts(4), n=2, sampling=Sampling(5), seeds=range(4))
    assert 0.9 < time.perf_counter() - start < 5


def test_a_pause_of_all_servers_is_survived(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    for server in stand_ins:
        server.fault["*"] = "disconnect"
    for server in stand_ins:
        threading.Timer(0.5, server.fault.clear).start()
    assert len(pool.generate(prompts(4), n=2, sampling=Sampling(5), seeds=range(4))) == 8
    assert pool.counters["server_failures"] == 2


def test_update_phases_in_order_then_the_new_version(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    pool.push(7, WEIGHTS.items())
    phases = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    for server in stand_ins:
        assert server.calls == [*phases, "/collective_rpc", "/reset_prefix_cache", "/resume"]
    rollouts = pool.generate(prompts(2), n=1, sampling=Sampling(5), seeds=[0, 1])
    assert pool.version == 7 and all(r.weight_versions == [7, 7] for r in rollouts)


PHASES = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]


def break_update(server: StandIn, phase: str) -> None:
    if phase == "stale":  # the server says yes and keeps the old weights
        server.fault["/update_weights"] = "ignore"
    elif phase == "cache":
        server.cache_reset = False
    else:
        server.fault[phase] = "hang" if phase == "/update_weights" else "500"


@pytest.mark.parametrize("phase", [*PHASES, "stale", "cache"])
def test_one_server_that_breaks_an_update_does_not_stop_the_others(
    pool: VLLMPool, stand_ins: list[StandIn], phase: str
) -> None:
    break_update(stand_ins[1], phase)
    pool.push(1, WEIGHTS.items())
    assert [server.usable for server in pool.servers] == [True, False] and pool.version == 1
    rollouts = pool.generate(prompts(4), n=1, sampling=Sampling(5), seeds=range(4))
    assert {v for r in rollouts for v in r.weight_versions} == {1} and not stand_ins[1].bodies
    assert pool.counters["server_failures"] == 1
    stand_ins[1].fault.clear()
    stand_ins[1].cache_reset = True
    pool.push(2, WEIGHTS.items())
    wait_until(lambda: pool.servers[1].usable, "the next update brings it back")
    assert stand_ins[1].loaded["version"] == 2


@pytest.mark.parametrize("phase", ["/update_weights", "stale"])
def test_an_update_that_nobody_takes_raises_and_serves_nothing(
    pool: VLLMPool, stand_ins: list[StandIn], phase: str
) -> None:
    for server in stand_ins:
        break_update(server, phase)
        if phase != "stale":
            server.fault["/health"] = "500"
    start = time.perf_counter()
    with pytest.raises(WeightUpdateError):
        pool.push(1, WEIGHTS.items())
    assert time.perf_counter() - start < 5 and pool.version == 0
    with pytest.raises(ServerError, match="no usable rollout server"):
        pool.generate(prompts(1), n=1, sampling=Sampling(5), seeds=[0])
    assert not list(Path(pool._options.sync_dir or "").rglob("*.safetensors")), "weights nobody has are not kept"


def test_staged_weights_stay_for_revivals_and_go_with_the_pool(
    pool: VLLMPool, stand_ins: list[StandIn], model_dir: Path
) -> None:
    pool.push(1, WEIGHTS.items())
    pool.push(2, WEIGHTS.items())
    assert len(list((model_dir / "sync").rglob("*.safetensors"))) == 1
    pool.close()
    assert not list((model_dir / "sync").iterdir())


def test_servers_given_by_url_serve_only_what_they_were_sent(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = StandIn(label="41")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server = ServerOptions(model_dir, max_model_len=32, max_num_seqs=8, dtype="float32")
    options = PoolOptions(revive_timeout_s=0.2, sync_dir=model_dir / "sync")
    pool = VLLMPool(server, options, num_servers=0, urls=[old.url], log_dir=model_dir)
    with pytest.raises(ServerError, match="no usable"):
        pool.generate(prompts(1), n=1, sampling=Sampling(5), seeds=[0])
    pool.push(3, WEIGHTS.items())
    assert pool.generate(prompts(1), n=1, sampling=Sampling(5), seeds=[0])[0].weight_versions == [3, 3]
    pool.close()
    old.stop()


# ---- updates while requests are in flight ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "responses"),
    [
        ("wait", {((10, 3), (0, 0))}),
        ("keep", {((10, 3), (0, 1))}),
        ("abort", {((10, 10, 4), (0, 1, 1))}),  # one token, then prompt and token are sent again
    ],
)
def test_requests_in_flight_at_an_update(
    stand_ins: list[StandIn], model_dir: Path, monkeypatch: Any, mode: str, responses: Any
) -> None:
    """Four samples are being written and four wait their turn; those come under the new weights in every mode."""
    pool = make_pool(stand_ins[:1], model_dir, monkeypatch, max_num_seqs=2, in_flight=mode)
    stand_ins[0].tokens_s = 0.5
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(pool.generate, [[10, 3, 4]] * 4, n=2, sampling=Sampling(3), seeds=range(4))
        wait_until(lambda: stand_ins[0].busy == 2, "two requests of two samples in flight")
        stand_ins[0].tokens_s = 0.01
        stand_ins[0].calls.clear()
        pool.push(1, WEIGHTS.items())
        rollouts = future.result()
    first, then = rollouts[:4], rollouts[4:]
    assert {(tuple(r.response_ids), tuple(r.weight_versions)) for r in first} == responses
    assert {tuple(r.weight_versions) for r in then} == {(1, 1)} and all(r.finish_reason == "length" for r in rollouts)
    assert pool.counters["continued"] == (4 if mode == "abort" else 0)
    assert "/reset_prefix_cache" in stand_ins[0].calls, "no keys and values of old weights are left"
    pool.close()


def test_first_come_first_served_over_several_batches(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    """The batch that is needed first is not overtaken by one that was begun later."""
    ended: list[str] = []
    with ThreadPoolExecutor(2) as executor:
        first = executor.submit(pool.generate, prompts(40), n=4, sampling=Sampling(5), seeds=range(40))
        first.add_done_callback(lambda _: ended.append("first"))
        wait_until(lambda: stand_ins[0].bodies, "the first batch is under way")
        second = executor.submit(pool.generate, prompts(4), n=4, sampling=Sampling(5), seeds=range(4))
        second.add_done_callback(lambda _: ended.append("second"))
        assert len(first.result()) == 160 and len(second.result()) == 16
    assert ended == ["first", "second"]


def test_the_line_is_ordered_by_batch_then_arrival_and_survives_cancelling() -> None:
    async def run() -> list[str]:
        line, order = Line(), []

        async def stand(number: int, name: str) -> None:
            async with line.front(number):
                order.append(name)
                await asyncio.sleep(0)

        tasks = [
            asyncio.create_task(stand(*who)) for who in ((0, "a"), (2, "d"), (1, "b"), (2, "e"), (1, "c"), (1, "x"))
        ]
        await asyncio.sleep(0)
        tasks[-1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await stand(0, "f")
        return order

    assert asyncio.run(run()) == ["a", "b", "c", "d", "e", "f"]


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
        "weight_versions": [{"version": "2-ab", "start": 0, "end": 1}, {"version": "3-cd", "start": 1, "end": 3}],
    }
    labels = {"2-ab": 2, "3-cd": 3}
    piece = parse_choice(choice, labels)
    assert piece.versions == [2, 3, 3] and piece.logprobs == [-0.1, -0.2, -0.3]
    with pytest.raises(ServerError, match="labelled '3-cd', which are not ours"):
        parse_choice(choice, {"2-ab": 2})
    for change in ({"finish_reason": None}, {"weight_versions": None}, {"token_ids": [4]}):
        with pytest.raises(ServerError, match="incomplete response"):
            parse_choice(choice | change, labels)
    nan = choice | {"logprobs": {"content": [{"logprob": -9999.0}] * 3}}
    with pytest.raises(ServerError, match="NaN"):
        parse_choice(nan, labels)


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


def test_sleep_and_wake_go_to_all_servers_and_failures_come_through(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    pool.sleep()
    pool.wake("weights")
    assert not any(server.usable for server in pool.servers)
    pool.push(1, WEIGHTS.items())
    pool.wake("kv_cache")
    assert all(server.usable for server in pool.servers)
    for stand_in in stand_ins:
        assert [path for path in stand_in.calls if path in ("/sleep", "/wake_up")] == ["/sleep", "/wake_up", "/wake_up"]
        assert stand_in.calls.index("/wake_up") < stand_in.calls.index("/update_weights")
    stand_ins[1].fault["/wake_up"] = "500"
    pool.sleep()
    with pytest.raises(WeightUpdateError, match="sleep or wake-up failed: .*/wake_up.* HTTP 500"):
        pool.wake("weights")


def test_a_sleeping_server_is_not_probed_and_a_lost_one_cannot_be_put_to_sleep(
    pool: VLLMPool, stand_ins: list[StandIn]
) -> None:
    pool.sleep()
    stand_ins[0].fault["/is_paused"] = "500"
    time.sleep(0.3)  # three probes would have come
    assert [server.state for server in pool.servers] == ["stale", "stale"]
    stand_ins[0].fault.clear()
    pool.wake("weights")
    pool.push(1, WEIGHTS.items())
    pool.wake("kv_cache")
    stand_ins[0].fault["*"] = "500"
    wait_until(lambda: pool.servers[0].state == "down", "the server is not found to have failed")
    with pytest.raises(WeightUpdateError, match="is down and cannot be put to sleep"):
        pool.sleep()


def test_servers_get_the_gpus_that_are_theirs(model_dir: Path) -> None:
    visible = ["0", "1", "2", "3"]
    assert server_gpus(visible, 2, colocated=False) == ["2", "3"]
    assert server_gpus(visible, 2, colocated=True) == ["0", "1"]
    assert server_gpus(visible, 4, colocated=False) == visible, "side by side when none is left"
    options = ServerOptions(model_dir, 32, 8, "auto", "cuda", gpu_memory_utilization=0.8, sleep_mode=True, gpus=["2"])
    assert gpu_environment(options, 1) == {"CUDA_VISIBLE_DEVICES": "2"}
    command = " ".join(server_command(options, 4711))
    assert "--gpu-memory-utilization 0.8" in command and "--enable-sleep-mode" in command
    on_cpu = ServerOptions(
        model_dir, 32, 8, "auto", gpu_memory_utilization=0.8, sleep_mode=True, kv_cache_bytes=1 << 26
    )
    assert gpu_environment(on_cpu, 1) == {}
    assert "--gpu-memory" not in " ".join(server_command(on_cpu, 1)) and "--enable-sleep" not in server_command(
        on_cpu, 1
    )
