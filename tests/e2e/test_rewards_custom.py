"""User-defined reward functions in the real sandbox, and weighted sums of verifiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_rewards_pool import needs_landlock

from configs.schema import RewardConfig
from recipes.rewards import RewardItem
from recipes.rewards.terms import check_reward, scorer_of, term_means
from recipes.rewards.types import RewardResult

MODULE = """
import os, time

def length(text, scale=1.0):
    return len(text) * scale

def verl_style(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 0.5, "acc": solution_str == ground_truth, "pred": solution_str}

def hostile(text):
    if text == "spin":
        while True: pass
    if text == "eat": bytearray(4 << 30)
    if text == "write": open("{victim}", "w").write("x")
    if text == "die": os._exit(3)
    if text == "nan": return float("nan")
    if text == "text": return "good"
    return text == "secret" and "REWARD_TEST_SECRET" in os.environ

def needs(text, target): return target
value = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "my_rewards.py").write_text(MODULE.replace("{victim}", str(tmp_path / "victim")))
    monkeypatch.chdir(tmp_path)  # the module is looked up in the trainer's working directory
    return "my_rewards"


def verdicts(texts: list[str], **reward: Any) -> list[RewardResult]:
    scorer = scorer_of(RewardConfig(**reward))
    try:
        return scorer.score([RewardItem(text, "gold") for text in texts])
    finally:
        scorer.close()


def judge(texts: list[str], **reward: Any) -> list[tuple[float, bool, str]]:
    results = verdicts(texts, **reward)
    return [(result.score, result.correct, result.status) for result in results]


def test_a_function_of_ones_own(module: str) -> None:
    assert judge(["abcd"], name=f"{module}:length", params={"scale": 0.5}) == [(2.0, True, "ok")]
    found = judge(["gold", "lead"], name=f"{module}:verl_style")
    assert found == [(0.5, True, "ok"), (0.5, False, "ok")]


@needs_landlock
def test_it_runs_in_the_sandbox_with_its_own_limits(module: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("REWARD_TEST_SECRET", "hunter2")
    texts = ["spin", "eat", "write", "die", "nan", "text", "secret", "fine"]
    found = judge(texts, name=f"{module}:hostile", timeout_s=0.5, memory_mb=1024, failure_score=-1.0)
    assert [status for _, _, status in found[:6]] == ["timeout", "invalid", "invalid", "crash", "crash", "invalid"]
    assert all(score == -1.0 and not correct for score, correct, _ in found[:6])
    assert found[6:] == [(0.0, False, "ok")] * 2
    assert (tmp_path / "victim").read_text() == "precious"


def test_terms_are_weighted_and_the_first_says_what_is_correct(module: str) -> None:
    terms = [
        {"name": "final_answer"},
        {"name": f"{module}:length", "weight": -0.01},
        {"name": f"{module}:hostile", "weight": 2.0, "timeout_s": 0.5},
    ]
    found = verdicts(["# gold", "# lead", "spin"], terms=terms, failure_score=-1.0)
    assert [(r.score, r.correct, r.status, r.terms) for r in found] == [
        (pytest.approx(1 - 0.06), True, "ok", (1.0, 6.0, 0.0)),
        (pytest.approx(-0.06), False, "ok", (0.0, 6.0, 0.0)),
        (pytest.approx(-0.04 - 2.0), False, "timeout", (0.0, 4.0, -1.0)),
    ]
    means = term_means(RewardConfig(terms=terms), [r.terms for r in found[:2]])
    assert means == {"final_answer": 0.5, f"{module}.length": 6.0, f"{module}.hostile": 0.0}
    assert term_means(RewardConfig(), [(), ()]) == term_means(RewardConfig(terms=terms), []) == {}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"name": "nowhere:f"}, "No module named 'nowhere'; start where it can be imported"),
        ({"name": "my_rewards:missing"}, "has no attribute 'missing'"),
        ({"name": "my_rewards:value"}, "is a int, not a function"),
        ({"name": "my_rewards:needs"}, "needs the argument target: set reward.params.target"),
        ({"name": "my_rewards:length", "params": {"scales": 1}}, "reward.params.scales: my_rewards:length has no such"),
        ({"name": "my rewards:f"}, "is unknown: choose one of final_answer"),
        ({"terms": ["math"]}, r"reward.terms\[0\]=math must be a mapping"),
        ({"terms": [{"name": "math", "wieght": 1}]}, r"reward.terms\[0\].wieght is unknown"),
        ({"terms": [{"name": "math", "weight": float("nan")}]}, r"weight=nan must be a finite number"),
        ({"terms": [{"name": "math", "timeout_s": 0}]}, r"timeout_s=0 must be a positive number"),
        ({"terms": [{"name": "math"}, {"name": "math"}]}, "names a verifier twice"),
        ({"terms": [{"name": "maths"}]}, "'maths' is unknown"),
    ],
)
def test_what_cannot_be_a_reward_is_refused(module: str, reward: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_reward(RewardConfig(**json.loads(json.dumps(reward))), load=True)
    assert "\n" not in str(caught.value)
