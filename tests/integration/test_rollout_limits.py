"""More concurrent requests than the limit of open files: none is lost, and no server is considered dead."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in import StandIn

from recipes.rollout.vllm import client

REQUESTS = 4096
CLIENT = """
import json, resource, sys
from pathlib import Path
soft, hard = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
import torch
from configs.schema import RolloutConfig
from recipes.rollout.engine import Sampling
from recipes.rollout.vllm.pool import VLLMPool
from recipes.rollout.vllm.server import Place
model = Path(sys.argv[3])
rollout = RolloutConfig(urls=sys.argv[4:], max_model_len=32, max_num_seqs=4096, sync_dir=str(model / "sync"))
pool = VLLMPool(rollout, Place(model, model))
pool.push(0, {"w": torch.arange(6.0)}.items())
rollouts = pool.generate([[10 + i, 3, 4] for i in range(4096)], n=1, sampling=Sampling(2), seeds=list(range(4096)))
assert [r.response_ids[0] for r in rollouts] == [10 + i for i in range(4096)]
print(json.dumps(pool.counters | {"soft": resource.getrlimit(resource.RLIMIT_NOFILE)[0]}))
pool.close()
"""


@pytest.mark.parametrize("hard", [1024, pytest.param(16384, marks=pytest.mark.slow)])
def test_thousands_of_requests_under_a_limit_of_1024_files(hard: int, tmp_path: Path) -> None:
    """The soft limit is 1024 (`ulimit -Sn 1024`). It is raised if the hard limit allows it, and respected otherwise."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 16384:
        pytest.skip("the hard limit of open files is below 16384")
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)  # of the servers
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    servers = [StandIn(), StandIn()]
    for server in servers:
        server.tokens_s = 0.5
    words = [sys.executable, "-c", CLIENT, "1024", str(hard), str(tmp_path), *(server.url for server in servers)]
    try:
        environment = os.environ | {"VLLM_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        assert said["requests"] == REQUESTS and said["retries"] == said["server_failures"] == 0
        assert said["soft"] == hard
        busy = sum(server.most_busy for server in servers)
        assert busy <= 1024 if hard == 1024 else busy > 1024
    finally:
        for server in servers:
            server.stop()


def test_too_many_open_files_is_not_the_servers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FILES_PAUSE_S", 0.01)
    tries = []

    class Session:
        def request(self, *_: object, **__: object) -> object:
            tries.append(1)
            raise OSError(errno.EMFILE if len(tries) < 4 else errno.ECONNREFUSED, "")

    server = client.Server.__new__(client.Server)
    server.url = "http://server"
    with pytest.raises(client.NoAnswer, match="ConnectionRefusedError"):
        asyncio.run(client.request(Session(), "GET", server, "/x", None, 5.0))  # type: ignore[arg-type]
    assert len(tries) == 4, "tried again until a file could be opened"
