"""Alternation of learner and servers on a simulated GPU that cannot hold both at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from configs.schema import RolloutConfig
from recipes.checks.settings import load_checked
from recipes.rollout import make
from recipes.rollout.colocated import Phase, Turns
from recipes.rollout.make import choose_sync

CAPACITY = 80
WEIGHTS, STATE, KV_CACHE = 15, 60, 60


class Gpu:
    """Memory by owner; raises when it is exhausted, or when an owner allocates twice."""

    def __init__(self) -> None:
        self.used: dict[str, int] = {}

    def take(self, owner: str, size: int) -> None:
        assert owner not in self.used, f"{owner} takes its memory twice"
        self.used[owner] = size
        if sum(self.used.values()) > CAPACITY:
            raise MemoryError(f"out of memory: {self.used}")

    def free(self, owner: str) -> None:
        self.used.pop(owner, None)


class FakeModel:
    def __init__(self, gpu: Gpu, name: str = "learner", weights: int = WEIGHTS, state: int = STATE) -> None:
        self.gpu, self.sizes = gpu, {f"{name} weights": weights, f"{name} state": state}
        self.weights, self.state = self.sizes
        for owner, size in self.sizes.items():
            gpu.take(owner, size)

    def offload(self, *, weights: bool = False) -> None:
        self.gpu.free(self.state)
        if weights:
            self.gpu.free(self.weights)

    def reload(self, *, optimizer: bool | None = None) -> None:
        wanted = [self.weights, self.state] if optimizer is None else [self.weights]
        for owner in wanted:
            if owner not in self.gpu.used:
                self.gpu.take(owner, self.sizes[owner])


class FakeServers:
    """Weights are valid only after a push that follows the last sleep."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.version, self.starts = gpu, None, 0
        self.fail_at = ""

    def start(self) -> FakeServers:
        if not self.starts:
            self.starts += 1
            self.gpu.take("server weights", WEIGHTS)
            self.gpu.take("server kv_cache", KV_CACHE)
        return self

    def sleep(self) -> None:
        self._may_fail("sleep")
        self.gpu.free("server weights")
        self.gpu.free("server kv_cache")
        self.version = None

    def wake(self, tag: str) -> None:
        self._may_fail(tag)
        assert tag == "weights" or self.version is not None, "the cache is woken before the weights are there"
        self.gpu.take(f"server {tag}", WEIGHTS if tag == "weights" else KV_CACHE)

    def _may_fail(self, what: str) -> None:
        if self.fail_at == what:
            raise ConnectionError(what)


class Setting:
    """A policy (and a critic) in training, servers not started yet."""

    def __init__(self, critic: bool = False) -> None:
        self.gpu = Gpu()
        self.policy = FakeModel(self.gpu, state=30 if critic else STATE)
        models = [self.policy, FakeModel(self.gpu, "critic", state=15)] if critic else [self.policy]
        self.servers = FakeServers(self.gpu)
        self.turns = Turns(models, self.servers.start)
        self.in_training = dict(self.gpu.used)

    def push(self, version: int) -> Callable[[], None]:
        def send() -> None:
            assert self.policy.weights in self.gpu.used and "server weights" in self.gpu.used
            self.servers.version = version

        return send


@pytest.mark.parametrize("critic", [False, True])
def test_they_never_hold_more_than_there_is(critic: bool) -> None:
    """Also at the start, where a server allocates all its memory at once; `Gpu` raises otherwise."""
    setting = Setting(critic)
    for version in (0, 0, 1):  # the first is evaluated and then trained on: sent twice, since sleep discards it
        with setting.turns.rollout(setting.push(version)):
            assert setting.turns.phase is Phase.ROLLOUT
            assert setting.servers.version == version
            assert setting.gpu.used == {"server weights": WEIGHTS, "server kv_cache": KV_CACHE}
        assert setting.turns.phase is Phase.TRAINING
        assert setting.gpu.used == setting.in_training
    assert setting.servers.starts == 1


def test_a_rank_without_servers_frees_its_memory_all_the_same() -> None:
    setting = Setting()
    turns, pushed = Turns([setting.policy], None), []
    with turns.rollout(lambda: pushed.append(dict(setting.gpu.used))):
        assert setting.gpu.used == {}
    assert pushed == [{"learner weights": WEIGHTS}]
    assert setting.gpu.used == setting.in_training


def test_a_turn_within_a_turn_is_refused() -> None:
    setting = Setting()
    with pytest.raises(RuntimeError, match="cannot go from rollout to handover"):
        with setting.turns.rollout(setting.push(0)):
            with setting.turns.rollout(setting.push(0)):
                pass
    assert setting.turns.phase is Phase.BROKEN


@pytest.mark.parametrize("where", ["weights", "kv_cache", "sleep", "push", "generation"])
def test_after_a_failure_nothing_goes_on(where: str) -> None:
    """The error propagates, and the next turn is refused: the run ends and resumes from its checkpoint."""
    setting = Setting()
    with setting.turns.rollout(setting.push(0)):
        pass
    setting.servers.fail_at = where

    def push() -> None:
        setting.push(1)()
        setting.servers._may_fail("push")

    with pytest.raises(ConnectionError, match=where):
        with setting.turns.rollout(push):
            setting.servers._may_fail("generation")
    with pytest.raises(RuntimeError, match="cannot go from broken to handover"):
        with setting.turns.rollout(push):
            pass


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rollout.max_staleness=1", "train.tis_cap=2"], "rollout.max_staleness=1"),
        (["rollout.weight_sync=nccl"], "rollout.weight_sync=nccl"),
        (["rollout.engine=local"], "rollout.engine=local"),
        (["rollout.urls=[http://a:1]"], "rollout.urls"),
    ],
)
def test_settings_that_cannot_take_turns_are_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        load_checked(["rollout.colocated=true", *arguments])
    assert "rollout.colocated=false" in str(error.value)


@pytest.mark.parametrize(
    ("changed", "gpus", "chosen"),
    [
        ({"colocated": True}, ["0"], "ipc"),
        ({"colocated": True, "num_servers": 2}, ["0", "1"], "auto"),
        ({"colocated": True, "server_gpus": 2}, ["0", "1"], "auto"),
        ({"colocated": True, "weight_sync": "disk"}, ["0"], "disk"),
        ({}, ["0"], "auto"),
        ({"weight_sync": "ipc"}, ["0"], "ipc"),
        ({"weight_sync": "ipc"}, ["1"], "have 1:"),
        ({"weight_sync": "ipc", "colocated": True, "num_servers": 2}, ["0", "1"], "have 0, 1:"),
    ],
)
def test_weights_go_by_shared_memory_where_learner_and_servers_share_one_gpu(
    changed: dict[str, Any], gpus: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make.ipc, "problem", lambda: None)
    rollout = RolloutConfig(**changed)
    if chosen in ("ipc", "auto", "disk"):
        assert choose_sync(rollout, gpus, "0") == chosen
    else:
        with pytest.raises(ValueError, match=f"rollout.weight_sync=ipc needs .*{chosen} set rollout.weight_sync=auto"):
            choose_sync(rollout, gpus, "0")


def test_weights_go_by_files_where_gpu_memory_cannot_be_shared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make.ipc, "problem", lambda: "no CUDA IPC")
    assert choose_sync(RolloutConfig(colocated=True), ["0"], "0") == "auto"
    assert "weights go by files" in (said := capsys.readouterr().out) and "(no CUDA IPC)" in said
