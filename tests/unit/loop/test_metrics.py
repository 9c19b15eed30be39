"""One step's line of metrics: names, weights of the averages, agreement with the rollout engine."""

from __future__ import annotations

import json
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext.rl.types import Rollout, Sample, TokenStats
from recipes.loop.metrics import StepMetrics


def sample(length: int, *, reward: float = 0.0, versions: list[int] | None = None, **fields: Any) -> Sample:
    ids = list(range(length))
    rollout = Rollout([1, 2, 3], ids, [-0.5] * length, versions or [0] * length, fields.pop("finish", "stop"))
    return Sample(rollout, "p", 0, 0, reward=reward, **fields)


def stats(logp: list[float], entropy: list[float] | None = None) -> TokenStats:
    zeros = torch.zeros(len(logp))
    return TokenStats(torch.tensor(logp), zeros if entropy is None else torch.tensor(entropy), zeros, zeros)


def update(tokens: float, **means: float) -> Any:
    return SimpleNamespace(means=means, diagnostic_sums={}, tokens=tokens)


def result(metrics: StepMetrics, **timing: float) -> dict[str, Any]:
    return metrics.result(timing)


def test_rollout_numbers() -> None:
    metrics = StepMetrics(3)
    metrics.rollouts(
        [
            sample(2, reward=1.0, correct=True),
            sample(4, reward=0.0, finish="length", status="timeout"),
            sample(6, reward=0.5, correct=True),
            sample(8, reward=-0.5, finish="length"),
        ]
    )
    row = result(metrics)
    expected = {
        "step": 3,
        "critic/rewards/mean": 0.25,
        "critic/rewards/std": math.sqrt((0.75**2 + 0.25**2 + 0.25**2 + 0.75**2) / 4),
        "critic/accuracy": 0.5,
        "reward/failures": 1.0,
        "response_length/mean": 5.0,
        "rollout/staleness": 2.0,
        "response_length/max": 8.0,
        "response_length/clip_ratio": 0.5,
        "rollout/samples": 4.0,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_without_samples_every_number_is_finite() -> None:
    metrics = StepMetrics(1)
    metrics.rollouts([])
    row = result(metrics)
    assert row["rollout/samples"] == 0 and row["critic/rewards/mean"] == 0
    assert all(math.isfinite(value) for value in json.loads(json.dumps(row)).values())


def test_updates_are_averaged_by_their_tokens() -> None:
    """Fractions of tokens are weighted by tokens; the objective, norm and rate of each update count once."""
    metrics = StepMetrics(1)
    metrics.rollouts([sample(1)])
    metrics.update(update(30, pg_clipfrac_low=0.1, pg_loss=1.0, grad_norm=2.0, lr=0.1, skipped_updates=0.0))
    metrics.update(update(10, pg_clipfrac_low=0.5, pg_loss=3.0, grad_norm=6.0, lr=0.3, skipped_updates=1.0))
    row = result(metrics)
    assert row["actor/pg_clipfrac_low"] == pytest.approx((30 * 0.1 + 10 * 0.5) / 40)
    assert (row["actor/pg_loss"], row["actor/grad_norm"], row["actor/lr"]) == pytest.approx((2.0, 4.0, 0.2))
    assert row["actor/skipped_updates"] == 0.5 and row["actor/updates"] == 2


def test_entropy_is_the_mean_over_all_response_tokens() -> None:
    metrics = StepMetrics(1)
    metrics.statistics(stats([-1.0, -2.0, -9.0], [0.5, 1.5, 4.0]), torch.tensor([0, 0, 2]))
    values = metrics.result({})
    assert values["actor/entropy"] == pytest.approx(2.0)
    assert values["actor/entropy_seq_mean"] == pytest.approx((1.0 + 4.0) / 2)  # sequence 1 has no token
    assert values["actor/logp_mean"] == pytest.approx(-4.0)


def test_agreement_looks_at_tokens_of_this_version_only() -> None:
    metrics = StepMetrics(5)
    samples = [sample(2, versions=[4, 4]), sample(2, versions=[2, 4])]
    metrics.rollouts(samples)
    rollout = torch.log(torch.tensor([0.5, 0.25, 0.9, 0.2]))
    learner = stats(torch.log(torch.tensor([0.5, 0.2, 0.1, 0.23])).tolist())
    metrics.agreement(samples, rollout, learner, version=4, limit=0.05)
    row = result(metrics)
    assert row["rollout_agreement/abs_dp_mean"] == pytest.approx((0.0 + 0.05 + 0.03) / 3, abs=1e-7)
    assert row["rollout_agreement/abs_dp_max"] == pytest.approx(0.05, abs=1e-7)
    gaps = [0.0, math.log(0.25 / 0.2), math.log(0.23 / 0.2)]
    assert row["rollout_agreement/abs_dlogp_mean"] == pytest.approx(sum(gaps) / 3, abs=1e-6)
    assert row["rollout/staleness"] == pytest.approx(2 / 4)


def test_disagreement_is_refused_in_one_sentence() -> None:
    metrics = StepMetrics(1)
    samples = [sample(2)]
    rollout, learner = torch.log(torch.tensor([0.5, 0.5])), stats(torch.log(torch.tensor([0.5, 0.4])).tolist())
    metrics.agreement(samples, rollout, learner, version=0, limit=0.06)
    with pytest.raises(ValueError, match=r"differ by 0.05 on average, above rollout.agreement_limit=0.04: .*repair"):
        metrics.agreement(samples, rollout, learner, version=0, limit=0.04)
    metrics.agreement(samples, rollout, learner, version=1, limit=0.0)  # stale tokens: nothing to compare


def test_timings_and_rates() -> None:
    begin = time.monotonic()
    metrics = StepMetrics(1)
    metrics.rollouts([sample(10), sample(30)])
    for _ in range(2):
        with metrics.clock("update"):
            time.sleep(0.01)
    with metrics.clock("eval"):
        time.sleep(0.05)
    row = result(metrics, generate=2.0)
    assert row["timing_s/update"] >= 0.02 and row["timing_s/eval"] >= 0.05
    outside_evaluation = time.monotonic() - begin - row["timing_s/eval"]
    assert row["timing_s/update"] <= row["timing_s/step"] <= outside_evaluation, "evaluation is no part of a step"
    assert row["timing_s/generate"] == 2.0 and row["perf/rollout_tokens_per_s"] == 20.0
    assert row["perf/throughput"] == pytest.approx((40 + 2 * 3) / row["timing_s/step"])


def learner(**work: Any) -> Any:
    """The learner's interface for `StepMetrics.learner`."""
    values = {"flops": 0.0, "ranks": 1, "peak_tflops": None, "time_imbalance": 0.0, "token_imbalance": 0.0}
    report = SimpleNamespace(**{**values, "peak_memory_gib": 1.5, **work})
    return SimpleNamespace(work_report=lambda *critics: report, packing_report=lambda: {"perf/padding_waste": 0.25})


def test_speed_of_the_learner_by_hand() -> None:
    """9e12 useful FLOPs on 4 ranks in 0.5 + 0.25 + 0.75 s: 1.5 TFLOP/s each, 3 % of 50."""
    metrics = StepMetrics(1)
    metrics.rollouts([sample(10), sample(30)])  # and two prompts of 3 tokens
    metrics.learner(learner(flops=9e12, ranks=4, peak_tflops=50.0, time_imbalance=0.2, token_imbalance=0.1), None)
    row = metrics.result({"statistics": 0.5, "values": 0.25, "update": 0.75, "generate": 3.0, "sync": 1.0})
    assert row["perf/tflops_per_rank"] == pytest.approx(1.5) and row["perf/mfu"] == pytest.approx(0.03)
    assert row["perf/learner_tokens_per_s"] == pytest.approx(46 / 1.5)
    assert row["perf/learner_tokens_per_s_per_rank"] == pytest.approx(46 / 1.5 / 4)
    assert row["perf/throughput_per_rank"] == pytest.approx(row["perf/throughput"] / 4)
    assert (row["perf/time_imbalance"], row["perf/token_imbalance"], row["perf/peak_memory_gib"]) == (0.2, 0.1, 1.5)
    assert row["perf/padding_waste"] == 0.25


def test_no_mfu_without_a_peak_and_critics_are_counted() -> None:
    seen: list[Any] = []
    policy, critic = learner(), object()
    report = policy.work_report
    policy.work_report = lambda *critics: seen.append(critics) or report()
    metrics = StepMetrics(1)
    metrics.rollouts([sample(1)])
    metrics.learner(policy, critic)  # type: ignore[arg-type]
    row = metrics.result({})
    assert seen == [(critic,)] and "perf/mfu" not in row and row["perf/tflops_per_rank"] == 0


def test_whatever_depends_on_the_machine_is_named_so() -> None:
    """Replays are compared on all metrics except ``timing_s/`` and ``perf/``."""

    def row(sleep_s: float) -> dict[str, Any]:
        metrics = StepMetrics(1)
        metrics.rollouts([sample(5, reward=1.0)])
        metrics.statistics(stats([-1.0] * 5, [0.5] * 5), torch.zeros(5, dtype=torch.long))
        metrics.update(update(5, pg_loss=1.0))
        with metrics.clock("update"):
            time.sleep(sleep_s)
        return result(metrics, generate=sleep_s)

    quick, slow = row(0.0), row(0.02)
    assert quick.keys() == slow.keys()
    different = {name for name in quick if quick[name] != slow[name]}
    assert different and all(name.startswith(("timing_s/", "perf/")) for name in different)


def test_ages_of_tokens() -> None:
    metrics = StepMetrics(4)  # trains with the weights of version 3
    metrics.rollouts([sample(4, versions=[1, 1, 3, 3]), sample(2, versions=[2, 2]), sample(2, versions=[3, 3])])
    row = result(metrics)
    assert row["rollout/staleness"] == (2 + 2 + 1 + 1) / 8 and row["rollout/cut_tokens"] == 2 / 8
