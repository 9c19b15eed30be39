"""The pool's dispatch, retries and revivals against stand-in servers; its real servers are in tests/e2e."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from stand_in import MIXTURE, WEIGHTS, StandIn, make_pool, prompts, wait_until

from configs.schema import RolloutConfig
from recipes.rollout.engine import Request, Sampling, request_seed
from recipes.rollout.vllm import client
from recipes.rollout.vllm.client import Line, Piece, ServerError, parse_answer
from recipes.rollout.vllm.pool import VLLMPool
from recipes.rollout.vllm.server import Place


def test_order_spread_and_bound(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    rollouts = pool.generate(prompts(40), n=4, sampling=Sampling(5), seeds=range(40))
    assert [r.response_ids[0] for r in rollouts] == [10 + index for index in range(40) for _ in range(4)]
    asked = [len(server.bodies) for server in stand_ins]
    assert sum(asked) == 40 and max(asked) <= 24, "whoever is done first gets the next one"
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
    """A hanging server is detected by a request to its engine, long before the requests' own time limit."""
    stand_ins[0].fault["*" if fault == "hang" else "/inference/v1/generate"] = fault
    start = time.perf_counter()
    rollouts = pool.generate(prompts(6), n=2, sampling=Sampling(5), seeds=range(6))
    assert len(rollouts) == 12 and time.perf_counter() - start < 8
    assert pool.counters["retries"] == 3 and pool.counters["server_failures"] == 1 and pool.counters["revived"] == 0
    assert not pool.servers[0].usable
    stand_ins[0].fault.clear()
    stand_ins[0].label = "default"  # restarted without the pool's knowledge
    wait_until(lambda: pool.servers[0].usable, "it must come back")
    assert pool.counters["revived"] == 1
    stand_ins[0].bodies.clear()
    again = pool.generate(prompts(6), n=2, sampling=Sampling(5), seeds=range(6))
    assert len(stand_ins[0].bodies) == 3 and {v for r in again for v in r.weight_versions.tolist()} == {0}


def test_a_server_with_other_weights_is_found_by_its_answer(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    """A server restarted between two requests, at the same address: only the version label reveals it."""
    stand_ins[0].label = "default"
    rollouts = pool.generate(prompts(6), n=2, sampling=Sampling(5), seeds=range(6))
    assert len(rollouts) == 12 and pool.counters["server_failures"] == 1
    assert {v for r in rollouts for v in r.weight_versions.tolist()} == {0}
    wait_until(lambda: pool.servers[0].usable, "it gets the weights again")
    assert stand_ins[0].label == stand_ins[1].label


def test_a_prompt_that_fails_everywhere_is_named(stand_ins: list[StandIn], model_dir: Path, monkeypatch: Any) -> None:
    pool = make_pool(stand_ins, model_dir, monkeypatch, revive_timeout_s=5.0)
    for server in stand_ins:
        server.fault["/inference/v1/generate"] = "500"

    def recover() -> None:  # the probe of a revival must succeed, and the request must fail again
        for server in stand_ins:
            server.fault.clear()
            server.fault["poison"] = "500"

    threading.Timer(0.2, recover).start()
    with pytest.raises(ServerError, match=r"3 tokens of prompt, \[77, 3, 4\].*failed on 3 servers.*HTTP 500"):
        pool.generate([[77, 3, 4]], n=2, sampling=Sampling(5), seeds=[0])
    pool.close()


def test_nobody_left(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    """The pool waits for a revival until its time limit, then fails with one sentence."""
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


def test_first_come_first_served_over_several_batches(
    pool: VLLMPool, stand_ins: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of the batch that is needed first run before those of a later batch."""
    sent: list[str] = []
    generate = pool._generate_unless_failed

    async def noted(server: client.Server, body: dict[str, Any]) -> bytes:
        sent.append("first" if len(body["token_ids"]) == 3 else "second")
        return await generate(server, body)

    monkeypatch.setattr(pool, "_generate_unless_failed", noted)
    with ThreadPoolExecutor(2) as executor:
        first = executor.submit(pool.generate, prompts(40), n=4, sampling=Sampling(5), seeds=range(40))
        wait_until(lambda: sent, "the first batch is under way")
        second = executor.submit(pool.generate, [[7, 7]] * 4, n=4, sampling=Sampling(5), seeds=range(4))
        assert len(first.result()) == 160 and len(second.result()) == 16
    assert sent == ["first"] * 40 + ["second"] * 4


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
    with pytest.raises(ValueError, match="VLLM_API_KEY"):
        VLLMPool(RolloutConfig(urls=["http://127.0.0.1:1"]), Place(model_dir, model_dir))


def test_parse_choice_labels_every_token_and_refuses_torn_answers() -> None:
    choice: dict[str, Any] = {
        "token_ids": [4, 5, 6],
        "logprobs": {"content": [{"logprob": -0.5, "token": "x"}, {"logprob": -0.25}, {"logprob": -0.125}]},
        "finish_reason": "stop",
        "weight_versions": [{"version": "2-ab", "start": 0, "end": 1}, {"version": "3-cd", "start": 1, "end": 3}],
    }
    labels = {"2-ab": 2, "3-cd": 3}

    def parse(changed: dict[str, Any], labels: dict[str, int] = labels) -> Piece:
        (piece,) = parse_answer(json.dumps({"request_id": "1", "choices": [changed]}).encode(), labels)
        return piece

    piece = parse(choice)
    assert piece.versions.tolist() == [2, 3, 3] and piece.logprobs.tolist() == [-0.5, -0.25, -0.125]
    both = piece.then(piece)
    assert both.tokens.tolist() == [4, 5, 6, 4, 5, 6] and len(both.logprobs) == len(both.versions) == 6
    with pytest.raises(ServerError, match="labelled '3-cd', which are not ours"):
        parse(choice, {"2-ab": 2})
    for change in ({"finish_reason": None}, {"weight_versions": None}, {"token_ids": [4]}, {"logprobs": None}):
        with pytest.raises(ServerError, match="incomplete response"):
            parse(choice | change)
    nan = choice | {"logprobs": {"content": [{"logprob": -9999.0}] * 3}}
    with pytest.raises(ServerError, match="NaN"):
        parse(nan)
    for torn in (b"", b"[]", b'{"choices": [{"token_ids": ["a"]}]}', b'{"choices": [{"token_ids": [1'):
        with pytest.raises(ServerError, match="not a generation"):
            parse_answer(torn, labels)


@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_experts_of_a_mixture_come_with_the_responses(
    stand_ins: list[StandIn], model_dir: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Experts of every token read, once, also when an update splits the response; evaluation does not request them."""
    (model_dir / "config.json").write_text(json.dumps(MIXTURE))
    for server in stand_ins:
        server.experts, server.tokens_s = (4, 2), 0.5
    with contextlib.closing(make_pool(stand_ins[:1], model_dir, monkeypatch, in_flight=mode)) as pool:
        sampling = Sampling(2, experts=True)
        with ThreadPoolExecutor(1) as background:
            asked = background.submit(pool.generate, [[5, 6, 7]], n=2, sampling=sampling, seeds=[0])
            wait_until(lambda: stand_ins[0].busy == 1, "a request in flight")
            pool.push(1, WEIGHTS.items())
            rollouts = asked.result()
        for rollout in rollouts:
            assert rollout.experts is not None and rollout.experts.shape == (4, 4, 2)
            assert rollout.experts[:, 0, 0].tolist() == [0, 1, 2, 3], "places of the tokens"
        stand_ins[0].bodies.clear()
        (rollout,) = pool.generate([[5, 6, 7]], n=1, sampling=Sampling(2), seeds=[0])
        assert rollout.experts is None
        assert stand_ins[0].bodies[0]["sampling_params"]["routed_experts_prompt_start"] == 3


def test_a_server_without_experts_is_named_where_they_are_required(
    stand_ins: list[StandIn], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model_dir / "config.json").write_text(json.dumps(MIXTURE))
    for required in (None, True):
        with contextlib.closing(make_pool(stand_ins[:1], model_dir, monkeypatch, routing_replay=required)) as pool:
            ask = partial(pool.generate, [[5, 6, 7]], n=1, sampling=Sampling(2, experts=True), seeds=[0])
            if required is None:
                assert ask()[0].experts is None
                continue
            with pytest.raises(ValueError, match="start it with --enable-return-routed-experts"):
                ask()


def test_a_connection_that_the_server_has_closed_is_no_fault(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    """Connections are reused, and a server may close one just as it is used."""
    for server in stand_ins:
        server.close_kept = True
    for _ in range(20):  # a busy machine may let connections grow too old
        assert len(pool.generate(prompts(16), n=2, sampling=Sampling(5), seeds=range(16))) == 32
        if sum(server.closed for server in stand_ins) > 4:
            break
    assert sum(server.closed for server in stand_ins) > 4
    assert pool.counters["server_failures"] == pool.counters["retries"] == 0


def test_request_seeds_of_neighbours_are_far_apart() -> None:
    seeds = sorted(request_seed(seed, first) for seed in range(1000) for first in (0, 8))
    assert 0 <= seeds[0] and seeds[-1] < 2**62
    assert min(b - a for a, b in zip(seeds, seeds[1:], strict=False)) > 1024, "vLLM adds the sample's index"


def test_open_requests_go_on_between_calls(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    """Requests that nobody awaits are still generated, and sent only once; a failure is raised when awaited."""
    fast, slow = [Request([10 + i, 3, 4], 1, i) for i in range(2)], Request([77, 3, 4], 1, 9)
    with closing(pool.complete([slow, *fast], sampling=Sampling(5))) as parts:
        first = [request for request in next(parts)]
    assert first and pool.counters["requests"] == 3
    wait_until(lambda: all(request.state is None or request.state.task.done() for request in (slow, *fast)), "all")
    rest = [request for part in pool.complete([slow, *fast], sampling=Sampling(5)) for request in part]
    assert len(first) + len(rest) == 3 and pool.counters["requests"] == 3
    assert [(request.rollouts or [])[0].response_ids[0] for request in fast] == [10, 11]
    for server in stand_ins:
        server.fault["poison"] = "500"
    with pytest.raises(ServerError, match="failed on 3 servers"):
        for _ in pool.complete([Request([77, 3, 4], 1, 0)], sampling=Sampling(5)):
            pass
