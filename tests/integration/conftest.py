"""Fixtures for the rollout pool's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in import StandIn, make_pool

from recipes.rollout.vllm.pool import VLLMPool


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


@pytest.fixture
def pool(stand_ins: list[StandIn], model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VLLMPool]:
    engine = make_pool(stand_ins, model_dir, monkeypatch)
    for server in stand_ins:
        server.calls.clear()
        server.bodies.clear()
    yield engine
    engine.close()
