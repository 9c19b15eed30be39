"""The gate: a short quick start, warm start included, still learns, and rollout and learner still agree.

Six steps of four passes over a batch. In runs of the study ``full_stack`` the mean reward of steps 5 and 6 is 0.16 to
0.21 above that of steps 1 and 2, and sampling moves that difference by about 0.04: a bound of 0.05 raises a false alarm
in fewer than 1 in 100 changes that alter nothing but the random numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training import launch_here

pytestmark = pytest.mark.e2e

WORDS = (
    "recipe=quickstart",
    "loss=grpo",
    "rollout.engine=local",
    "train.steps=6",
    "train.epochs=4",
    "train.save_every=0",
    "eval.problems=8",
    "run.report_every=0",
)


def test_the_quick_start_learns(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert launch_here([*WORDS, f"run.dir={run}", f"model.cache_dir={tmp_path / 'cache'}"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reward = [row["critic/rewards/mean"] for row in rows]
    assert sum(reward[4:6]) / 2 > sum(reward[:2]) / 2 + 0.05, reward
    entropy = [row["actor/entropy"] for row in rows]
    assert 0.1 < entropy[-1] < entropy[0]
    assert max(row["rollout_agreement/abs_dp_mean"] for row in rows) < 1e-5
    assert all(0.001 < row["actor/pg_clipfrac_low"] < 0.2 for row in rows), "four passes clip about 1 % of the tokens"
