"""The real math verifier in real workers against inputs that exhaust resources, and its accuracy on a file of cases."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from recipes.rewards import RewardItem, RewardPool

pytestmark = pytest.mark.e2e

TIMEOUT_S = 1.0
ROOT = Path(__file__).resolve().parents[2]
CASES = os.environ.get("VERIFIER_CASES", str(ROOT.parent / "shared" / "data" / "verifier_cases.jsonl"))

BOMBS = {
    "power tower": r"\boxed{9^{9^{9^{9}}}}",
    "python power": r"\boxed{9**9**9**9}",
    "factorial": r"\boxed{100000000!}",
    "nested factorial": r"\boxed{((10!)!)!}",
    "binomial": r"\boxed{\binom{10000000}{5000000}}",
    "integral": r"\boxed{\int_0^1 \sin(x^{x^x}) e^{\tan(x)} dx}",
    "sum": r"\boxed{\sum_{n=1}^{100000000} \frac{1}{n^3}}",
    "deep braces": r"\boxed{" + "{" * 900 + "1" + "}" * 900 + "}",
    "deep roots": r"\boxed{" + r"\sqrt{" * 300 + "2" + "}" * 300 + "}",
    "deep fractions": r"\boxed{" + r"\frac{1}{" * 200 + "2" + "}" * 200 + "}",
    "long sum": r"\boxed{" + "1+" * 900 + "1}",
    "giant number": r"\boxed{" + "1" * 10_000_000 + "}",
    "giant text": "x" * 10_000_000,
    "many boxes": r"\boxed{" * 1_000_000,
    "control characters": "\\boxed{\x00\ud800\x1b[2J\n}",
    "code": r"\boxed{__import__('os').system('touch {marker}')}",
}


@pytest.fixture(scope="module")
def pool():
    with RewardPool("math", {"require_box": False}, workers=1, timeout_s=TIMEOUT_S, memory_mb=1024) as pool:
        yield pool


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_survived_and_scored_zero(pool: RewardPool, name: str, tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    pool.score([RewardItem(r"\boxed{1}", "1")])  # a warm worker, so that only the bomb is timed
    started = time.monotonic()
    bomb, good = pool.score(
        [RewardItem(BOMBS[name].replace("{marker}", str(marker)), "7"), RewardItem(r"\boxed{\frac{14}{2}}", "7")]
    )
    assert (bomb.score, bomb.correct) == (0.0, False)
    assert good.correct and good.status == "ok", "the next response must not suffer"
    assert not marker.exists(), "model output was executed"
    assert time.monotonic() - started < TIMEOUT_S + 30  # a replacement has to import a computer algebra system


def test_bombs_in_every_slot_do_not_exhaust_the_pool() -> None:
    items = [RewardItem(BOMBS["power tower"], "7") if i % 3 == 0 else RewardItem(r"\boxed{7}", "7") for i in range(9)]
    with RewardPool("math", workers=2, timeout_s=1.0) as pool:
        results = pool.score(items)
    assert [result.correct for result in results] == [i % 3 != 0 for i in range(9)]
    assert pool.counts == {"ok": 6, "timeout": 3} and pool.restarts == 3


def test_bomb_in_the_gold_answer_is_survived(pool: RewardPool) -> None:
    assert pool.score([RewardItem(r"\boxed{2}", BOMBS["power tower"])])[0].status == "timeout"


def test_memory_limit_holds() -> None:
    with RewardPool("math", {"max_answer_chars": 10**8}, workers=1, timeout_s=20.0, memory_mb=512) as pool:
        (result,) = pool.score([RewardItem(r"\boxed{" + "1+" * 3_000_000 + "1}", "7")])
        assert not result.correct
        (worker,) = [worker for worker in pool._slots if worker]
        assert psutil.Process(worker._process.pid).memory_info().vms < 600 << 20


def test_too_little_memory_to_start_is_an_error_not_a_score() -> None:
    with RewardPool("math", memory_mb=1) as pool, pytest.raises(RuntimeError, match=r"cannot start.*memory"):
        pool.score([RewardItem(r"\boxed{1}", "1")])


def test_workers_do_not_outlive_a_killed_trainer() -> None:
    trainer = (
        "from recipes.rewards import *; import sys\n"
        "pool = RewardPool('math', timeout_s=2.0)\n"
        "pool.score([RewardItem(r'\\boxed{1}', '1')])\n"
        "print(pool._slots[0]._process.pid, flush=True)\n"
        "pool._timeout_s = 1000.0\n"  # the trainer would wait; the worker's own limit is shorter
        "pool.score([RewardItem(r'\\boxed{9^{9^{9^{9}}}}', '7')])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", trainer], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    worker = psutil.Process(int(process.stdout.readline()))
    time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


@pytest.mark.skipif(not Path(CASES).is_file(), reason="set VERIFIER_CASES to a JSONL file of labelled cases")
def test_accuracy_on_collected_cases() -> None:
    rows = [json.loads(line) for line in Path(CASES).read_text(encoding="utf-8").splitlines()]
    items = []
    for row in rows:
        bare = row["kind"] in ("answer", "model_answer") and "boxed" not in row["prediction"]
        text = rf"\boxed{{{row['prediction']}}}" if bare else row["prediction"]
        items.append(RewardItem(text, row["gold"]))
    with RewardPool("math", {"require_box": False}, workers=2, timeout_s=20.0) as pool:
        results = pool.score(items)
    right = [result.correct == row["equal"] for result, row in zip(results, rows, strict=True)]
    plain = [hit for hit, row in zip(right, rows, strict=True) if not row["policy"]]
    policy = [hit for hit, row in zip(right, rows, strict=True) if row["policy"]]
    fooled = [row for r, row in zip(results, rows, strict=True) if r.correct and not (row["equal"] or row["policy"])]
    print(f"plain {sum(plain)}/{len(plain)}, policy {sum(policy)}/{len(policy)}, {dict(pool.counts)}")
    assert not fooled, "a wrong answer rewarded teaches the policy to cheat"
    assert sum(plain) / len(plain) >= 0.99
