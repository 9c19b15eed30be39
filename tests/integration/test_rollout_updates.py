"""Weight updates of the pool against stand-in servers, without faults, with faults, and during generation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in import WEIGHTS, StandIn, make_pool, prompts, wait_until

from configs.schema import RolloutConfig
from megatron_ext.sync.base import WeightUpdateError
from megatron_ext.sync.ipc import IpcSync
from recipes.rollout.engine import Sampling
from recipes.rollout.vllm import update as vllm_update
from recipes.rollout.vllm.client import ServerError
from recipes.rollout.vllm.pool import VLLMPool
from recipes.rollout.vllm.server import Place


def test_update_phases_in_order_then_the_new_version(pool: VLLMPool, stand_ins: list[StandIn]) -> None:
    pool.push(7, WEIGHTS.items())
    phases = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    for server in stand_ins:
        assert server.calls == [*phases, "/collective_rpc", "/reset_prefix_cache", "/resume"]
    rollouts = pool.generate(prompts(2), n=1, sampling=Sampling(5), seeds=[0, 1])
    assert pool.version == 7 and all(r.weight_versions.tolist() == [7, 7] for r in rollouts)


@pytest.fixture
def sharing(stand_ins: list[StandIn], model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VLLMPool]:
    """A pool that shares memory with its servers."""
    engine = make_pool(stand_ins, model_dir, monkeypatch, weight_sync="ipc")
    for server in stand_ins:
        server.bodies.clear()
    yield engine
    engine.close()


PHASES = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]


def break_update(server: StandIn, phase: str) -> None:
    if phase == "stale":  # the server reports success and keeps the old weights
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
    assert {v for r in rollouts for v in r.weight_versions.tolist()} == {1} and not stand_ins[1].bodies
    assert pool.counters["server_failures"] == 1
    stand_ins[1].fault.clear()
    stand_ins[1].cache_reset = True
    pool.push(2, WEIGHTS.items())
    wait_until(lambda: pool.servers[1].usable, "the next update brings it back")
    assert stand_ins[1].loaded["version"] == 2


@pytest.mark.parametrize("phase", [*PHASES, "stale", "cache"])
def test_one_server_that_breaks_an_update_by_shared_memory(
    sharing: VLLMPool, stand_ins: list[StandIn], phase: str
) -> None:
    test_one_server_that_breaks_an_update_does_not_stop_the_others(sharing, stand_ins, phase)
    assert torch.equal(stand_ins[0].received["w"], WEIGHTS["w"])


def test_shared_memory_that_changed_after_the_checksum_is_refused_by_all(
    sharing: VLLMPool, stand_ins: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, seal = sharing._sync, sharing._sync.seal
    assert isinstance(sync, IpcSync)

    def damage(*args: Any) -> None:
        seal(*args)
        sync._buckets.memory[0].view[3] ^= 4

    monkeypatch.setattr(sync, "seal", damage)
    with pytest.raises(WeightUpdateError, match="w is not what was sent"):
        sharing.push(1, WEIGHTS.items())
    assert [server.loaded["version"] for server in stand_ins] == [0, 0] and sync.info is None
    monkeypatch.undo()
    sharing.push(2, WEIGHTS.items())
    assert [server.loaded["version"] for server in stand_ins] == [2, 2]


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
    assert not list(Path(pool._rollout.sync_dir or "").rglob("*.safetensors")), "weights nobody has are not kept"


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
    rollout = RolloutConfig(urls=[old.url], max_model_len=32, revive_timeout_s=0.2, sync_dir=str(model_dir / "sync"))
    pool = VLLMPool(rollout, Place(model_dir, model_dir))
    with pytest.raises(ServerError, match="no usable"):
        pool.generate(prompts(1), n=1, sampling=Sampling(5), seeds=[0])
    pool.push(3, WEIGHTS.items())
    assert pool.generate(prompts(1), n=1, sampling=Sampling(5), seeds=[0])[0].weight_versions.tolist() == [3, 3]
    pool.close()
    old.stop()


def test_a_broadcast_that_breaks_off_is_repeated_without_the_silent(
    stand_ins: list[StandIn], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three servers; one hangs during the transfer, recovers, and gets the version from a new group."""
    monkeypatch.setattr(vllm_update, "GROUP_TIMEOUT_S", 1.0)
    monkeypatch.setattr(vllm_update, "GRACE_S", 0.5)
    servers = [*stand_ins, StandIn()]
    limits: dict[str, Any] = {
        "weight_sync": "gloo",
        "sync_dir": None,
        "update_timeout_s": 20.0,
        "revive_timeout_s": 20.0,
    }
    pool = make_pool(servers, model_dir, monkeypatch, **limits)
    pool.push(1, WEIGHTS.items())
    joined = [server.calls.count("/init_weight_transfer_engine") for server in servers]
    assert joined == [1, 1, 1], "the group is made once"
    servers[1].fault["/update_weights"] = "hang"
    new = {"w": WEIGHTS["w"] + 1}
    start = time.perf_counter()
    pool.push(2, new.items())
    assert time.perf_counter() - start < 10 and [server.usable for server in pool.servers] == [True, False, True]
    assert all(torch.equal(servers[i].received["w"], new["w"]) for i in (0, 2))
    servers[1].fault.clear()
    wait_until(lambda: pool.servers[1].usable, "it gets the version that the others serve")
    assert torch.equal(servers[1].received["w"], new["w"]) and servers[1].loaded["version"] == 2
    pool.push(3, WEIGHTS.items())
    assert all(server.usable for server in pool.servers) and {server.loaded["version"] for server in servers} == {3}
    pool.close()
    servers[2].stop()


@pytest.mark.parametrize("fault", ["hang", "disconnect"])
def test_a_server_that_dies_while_the_group_is_made_is_left_out(
    stand_ins: list[StandIn], model_dir: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """It has reported its number of workers and never joins: the others wait no longer than a limit."""
    monkeypatch.setattr(vllm_update, "GROUP_TIMEOUT_S", 1.0)
    monkeypatch.setattr(vllm_update, "GRACE_S", 0.5)
    stand_ins[1].fault["/init_weight_transfer_engine"] = fault
    start = time.perf_counter()
    limits: dict[str, Any] = {"weight_sync": "gloo", "sync_dir": None, "update_timeout_s": 20.0}
    pool = make_pool(stand_ins, model_dir, monkeypatch, **limits)
    assert time.perf_counter() - start < 10
    assert [server.usable for server in pool.servers] == [True, False]
    assert torch.equal(stand_ins[0].received["w"], WEIGHTS["w"])
    pool.close()


# ---- updates while requests are in flight ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "responses"),
    [
        ("wait", {((10, 3), (0, 0))}),
        ("keep", {((10, 3), (0, 1))}),
        ("abort", {((10, 10, 4), (0, 1, 1))}),  # one token, then prompt and token are resent
    ],
)
def test_requests_in_flight_at_an_update(
    stand_ins: list[StandIn], model_dir: Path, monkeypatch: Any, mode: str, responses: Any
) -> None:
    """Four samples are running and four are queued; the queued ones use the new weights in every mode."""
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
    assert {(tuple(r.response_ids.tolist()), tuple(r.weight_versions.tolist())) for r in first} == responses
    assert {tuple(r.weight_versions.tolist()) for r in then} == {(1, 1)} and all(
        r.finish_reason == "length" for r in rollouts
    )
    assert pool.counters["continued"] == (4 if mode == "abort" else 0)
    assert "/reset_prefix_cache" in stand_ins[0].calls, "no keys and values of old weights are left"
    pool.close()


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
    time.sleep(0.3)  # enough time for three probes
    assert [server.state for server in pool.servers] == ["stale", "stale"]
    stand_ins[0].fault.clear()
    pool.wake("weights")
    pool.push(1, WEIGHTS.items())
    pool.wake("kv_cache")
    stand_ins[0].fault["*"] = "500"
    wait_until(lambda: pool.servers[0].state == "down", "the server is not found to have failed")
    with pytest.raises(WeightUpdateError, match="is down and cannot be put to sleep"):
        pool.sleep()
