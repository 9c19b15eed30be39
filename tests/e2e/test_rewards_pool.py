"""The worker pool, with stub verifiers that hang, die, print and cheat. The real verifier's bombs are in tests/e2e."""

import ctypes
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from recipes.rewards import RewardItem, RewardPool, RewardResult
from recipes.rewards.pool import _worker_environment


def landlock_abi() -> int:
    """Version of the kernel's Landlock interface, below 1 when it has none."""
    return ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) if sys.platform.startswith("linux") else -1


needs_landlock = pytest.mark.skipif(landlock_abi() < 6, reason="this kernel's Landlock does not cover all of it")

# A verifier that follows instructions in the text, served by the real worker loop.
STUB = """
import os, socket, subprocess, sys, time
from recipes.rewards.types import RewardResult
from recipes.rewards.worker import open_private_pipes, serve

def attempt(action):
    try:
        action()
        return True
    except Exception:
        return False

class Stub:
    in_process = False
    served = 0
    def __call__(self, item):
        Stub.served += 1
        word, _, argument = item.text.partition(" ")
        if word == "exit": os._exit(3)
        if word == "hang":
            while True: pass
        if word == "sleep": time.sleep(float(argument))
        if word == "raise": raise RecursionError(argument)
        if word == "print": os.write(1, b"[1.0, true, \\"ok\\"]\\n" * 5); print("noise", flush=True)
        if word == "nan": return RewardResult(float("nan"), True)
        if word == "status": return RewardResult(1.0, True, "splendid")
        if word == "exit-if-worn" and Stub.served > 2: os._exit(3)
        if word == "memory": bytearray(int(argument) << 20)
        checks = {
            "write": lambda: open(argument, "w").write("x"),
            "unlink": lambda: os.unlink(argument),
            "spawn": lambda: subprocess.run(["true"], check=True),
            "signal": lambda: os.kill(int(argument), 0),
            "connect": lambda: socket.create_connection(("127.0.0.1", int(argument)), timeout=1),
            "secret": lambda: os.environ["REWARD_TEST_SECRET"],
        }
        if word in checks:
            return RewardResult(float(attempt(checks[word])), False)
        return RewardResult(float(item.key), item.text == item.gold)

pipes = open_private_pipes()
serve(Stub(), timeout_s=0.5, memory_mb=512, pipes=pipes)
"""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[RewardPool]:
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    with RewardPool("math", workers=2, timeout_s=0.5, failure_score=-0.5, command=[sys.executable, str(stub)]) as pool:
        yield pool


def scores(pool: RewardPool, *texts: str) -> list[RewardResult]:
    return pool.score([RewardItem(text, "good", key=key) for key, text in enumerate(texts)])


def test_results_come_in_order_from_warm_workers(pool: RewardPool) -> None:
    results = scores(pool, *["good", "bad"] * 50)
    assert [result.score for result in results] == list(range(100))
    assert [result.correct for result in results] == [True, False] * 50
    before = {worker._process.pid for worker in pool._slots if worker}
    scores(pool, "good", "good")
    assert {worker._process.pid for worker in pool._slots if worker} == before
    assert (pool.restarts, pool.counts) == (0, {"ok": 102})


def test_hung_and_crashed_workers_are_replaced_and_counted(pool: RewardPool) -> None:
    started = time.monotonic()
    results = scores(pool, "good", "hang", "exit", "good", "sleep 60", "good")
    assert [result.status for result in results] == ["ok", "timeout", "crash", "ok", "timeout", "ok"]
    assert [result.score for result in results] == [0, -0.5, -0.5, 3, -0.5, 5]
    assert not any(results[i].correct for i in (1, 2, 4))
    assert pool.counts == {"ok": 3, "timeout": 2, "crash": 1}
    assert pool.restarts >= 3
    assert time.monotonic() - started < 20


def test_a_response_that_spins_costs_a_fork_and_not_a_worker(pool: RewardPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.rewards.pool.CLOCK_FACTOR", 200.0)  # even on a busy machine
    pool._slots = pool._slots[:1]
    scores(pool, "good")
    worker = pool._slots[0]
    results = scores(pool, "hang", "good", "exit", "good")
    assert [result.status for result in results] == ["timeout", "ok", "crash", "ok"]
    assert pool._slots[0] is worker, "the process that loaded the libraries goes on"


def test_a_worker_worn_out_by_others_does_not_cost_a_sample_its_score(pool: RewardPool) -> None:
    # The warm-up item counts as served: the first text finds a worker that served one, the second one that served two.
    pool._slots = pool._slots[:1]
    results = scores(pool, "good", "exit-if-worn")
    assert [result.status for result in results] == ["ok", "ok"]
    assert pool.restarts == 1


def test_errors_of_the_verifier_are_invalid_not_fatal(pool: RewardPool) -> None:
    assert scores(pool, "raise x", "memory 4096") == [RewardResult(-0.5, False, "invalid")] * 2
    assert pool.restarts == 0


def test_output_of_libraries_does_not_reach_the_protocol(pool: RewardPool) -> None:
    assert [result.score for result in scores(pool, "print", "bad", "print", "bad")] == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["nan", "status"])
def test_malformed_answers_are_crashes(pool: RewardPool, text: str) -> None:
    assert scores(pool, text) == [RewardResult(-0.5, False, "crash")]


def test_giant_texts_pass_the_pipe(pool: RewardPool) -> None:
    assert scores(pool, "x" * 5_000_000, "good")[1].correct


@needs_landlock
def test_workers_cannot_touch_files(pool: RewardPool, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    write, unlink = scores(pool, f"write {victim}", f"unlink {victim}")
    assert (write.score, unlink.score) == (0, 0)
    assert victim.read_text() == "precious"


@needs_landlock
def test_workers_cannot_reach_out(pool: RewardPool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        texts = ["spawn", f"signal {os.getpid()}", f"connect {server.getsockname()[1]}"]
        assert [result.score for result in scores(pool, *texts)] == [0, 0, 0]


def test_workers_see_no_secrets(pool: RewardPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TEST_SECRET", "hunter2")
    assert scores(pool, "secret")[0].score == 0
    assert "hunter2" not in _worker_environment().values()


def test_close_leaves_no_process(pool: RewardPool) -> None:
    scores(pool, "good", "good")
    processes = [psutil.Process(worker._process.pid) for worker in pool._slots if worker]
    assert len(processes) == 2
    pool.close()
    assert not any(process.is_running() for process in processes)
    assert scores(pool, "good")[0].correct, "a closed pool starts again when used"


def test_a_worker_that_cannot_start_says_why() -> None:
    with RewardPool("math", command=[sys.executable, "-c", "raise SystemExit(1)"]) as pool:
        with pytest.raises(RuntimeError, match="cannot start"):
            pool.score([RewardItem("x", "y")])


@pytest.mark.parametrize("settings", [{"workers": 0}, {"timeout_s": 0}, {"memory_mb": -1}, {"params": {"x": 1}}])
def test_bad_settings_are_refused_before_any_process_starts(settings: dict) -> None:
    with pytest.raises(ValueError, match="reward"):
        RewardPool("math", **settings)


def test_workers_load_neither_torch_nor_megatron() -> None:
    code = "import recipes.rewards.worker, sys; assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=_worker_environment())
