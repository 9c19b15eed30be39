"""Results files, resuming, statistics and verdicts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from recipes.studies import report, results, runner, statistics, summary
from recipes.studies.definitions import Study
from recipes.studies.engine import Setting, evaluation_steps
from recipes.studies.full_stack import entropy_agreement
from recipes.studies.full_stack import summary as run_summary
from recipes.studies.methods import LOSSES

TINY = Setting(steps=2, prompts=2, n=4, mini_batches=2)
STUDY = Study(
    title="t",
    question="q",
    settings={"tiny": TINY},
    methods={name: LOSSES[name] for name in ("GRPO", "eps_low 0.05")},
    seeds={"L1": 3},
)


def test_a_study_resumes_and_its_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    rows = runner.run("tiny", STUDY, root=tmp_path, seeds=2, jobs=1, report=said.append)
    assert len(rows) == 4 and {row["seed"] for row in rows} == {0, 1} and "left" in said[-1]
    path = tmp_path / "tiny.jsonl"
    with path.open("a") as file:
        file.write('{"torn": ')  # killed while writing
    monkeypatch.setattr(runner, "_run", None)  # no run may be repeated
    assert runner.run("tiny", STUDY, root=tmp_path, seeds=2) == rows
    assert not list(runner.missing("tiny", STUDY, rows, 2, "L2"))
    assert [item.name for item in runner.missing("tiny", STUDY, [], methods=["eps_low 0.05"])] == ["eps_low 0.05"]
    (more,) = {item.seeds for item in runner.missing("tiny", STUDY, rows, None, None)}
    assert more == (2,)
    needed = {"study", "method", "seed", "level", "final_entropy", "entropy_auc", "avg_at_k", "pass_at_k"}
    assert needed | {"clip_low", "clip_high", "collapsed", "command", "machine"} <= rows[0].keys()
    page = report.study_page("tiny", "Title <b>", "q", tmp_path / "page.html", tmp_path).read_text()
    assert "Title &lt;b&gt;" in page and "eps_low 0.05" in page and "://" not in page


def test_a_changed_definition_is_run_again() -> None:
    rows = [{"setting": "tiny", "method": "GRPO", "digest": "old", "seed": s} for s in range(3)]
    assert {item.name for item in runner.missing("tiny", STUDY, rows, None, None)} == {"GRPO", "eps_low 0.05"}


def test_a_torn_line_is_cut_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a"')
    results.append(path, [{"a": 2}])
    assert [row["a"] for row in results.read(path)] == [1, 2]
    path.write_text('{"a"\n{"a": 2}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        results.read(path)


def test_blocks_of_seeds_join_exactly() -> None:
    values = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def line(block: torch.Tensor) -> dict[str, object]:
        both = [block.mean(0).tolist(), block.std(0).tolist()]
        row = {"setting": "s", "method": "m", "digest": "d", "n": len(block), "steps": [0, 1, 2]}
        return row | {name: both for name in results.KEPT_CURVES}

    joined = report.merge_curves([line(values[:3]), line(values[3:])])["s", "m"]
    assert joined["n"] == 7
    assert joined["entropy"][0] == pytest.approx(values.mean(0).tolist())
    assert joined["entropy"][1] == pytest.approx(values.std(0).tolist())


@pytest.mark.parametrize(
    ("avg", "reward", "expected"),
    [
        ([0.2, 0.5, 0.4], "answer", False),
        ([0.2, 0.9, 0.4], "answer", True),
        ([0.2, 0.3, 0.1], "answer", True),
        ([0.2, 0.3, 0.1], "random", False),
        ([0.2, math.nan, 0.5], "answer", True),
        ([0.2, math.nan, 0.5], "random", True),
    ],
)
def test_collapse(avg: list[float], reward: str, expected: bool) -> None:
    assert results.collapsed(torch.tensor(avg), reward) is expected


def test_equal_reward_is_interpolated() -> None:
    setting = Setting(steps=2)
    assert evaluation_steps(setting) == [0, 1, 2]
    curves = {"avg": [0.2, 0.5, 0.7], "entropy": [1.0, 0.8, 0.4], "pass": [0.5, 0.8, 0.9]}
    found = results.at_equal_reward(setting, {k: torch.tensor([v]) for k, v in curves.items()}, 0)
    assert found == {"entropy_at_equal": 0.6, "pass_at_equal": 0.85}
    curves["avg"] = [0.2, 0.5, 0.55]
    assert results.at_equal_reward(setting, {k: torch.tensor([v]) for k, v in curves.items()}, 0) == {}


def test_t_quantiles_and_tails() -> None:
    """Tables of Student's distribution."""
    for df, expected in ((1, 12.706), (4, 2.776), (9, 2.262), (63, 1.998)):
        assert statistics.student_quantile(0.95, df) == pytest.approx(expected, abs=6e-4)
    assert statistics.student_tail(2.0, 5) == pytest.approx(0.05097, abs=1e-5)
    assert statistics.student_tail(0.0, 3) == pytest.approx(0.5, abs=1e-6)


def test_intervals_and_pairs() -> None:
    found = statistics.interval([1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.n) == (2.5, 4)
    assert found.half == pytest.approx(3.1824 * math.sqrt(5 / 3) / 2, rel=1e-4)
    with pytest.raises(ValueError, match="finite"):
        statistics.interval([1.0, math.nan])
    difference, p = statistics.paired({0: 1.0, 1: 2.0, 2: 2.5, 9: 7.0}, {0: 0.5, 1: 1.0, 2: 2.0})
    assert (difference.n, difference.mean) == (3, pytest.approx(2 / 3))
    assert p == pytest.approx(0.0572, abs=1e-4)  # t = 4 with 2 degrees of freedom
    assert statistics.paired({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0})[1] == 1.0
    assert math.isnan(statistics.paired({0: 1.0}, {0: 0.0})[1])
    low, high = statistics.wilson(0, 10)
    assert low == pytest.approx(0.0, abs=1e-12) and high == pytest.approx(0.2775, abs=1e-3)


def test_holm() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, math.nan])[:3] == pytest.approx([0.03, 0.06, 0.06])


def test_verdicts_count_collapsed_runs() -> None:
    def row(method: str, seed: int, entropy: float, avg: float) -> results.Row:
        common = {"method": method, "seed": seed, "setting": "s", "entropy_auc": entropy, "pass_at_k": avg}
        return common | {"final_entropy": entropy, "avg_at_k": avg, "collapsed": avg < 0.2}

    rows = [row("GRPO", s, 0.5 + 0.01 * s, 0.8 + 0.01 * s) for s in range(6)]
    rows += [row("x", s, 0.7 + 0.011 * s, 0.1 if s == 0 else 0.9) for s in range(6)]
    base, x = summary.summarise(summary.by_setting(rows)["s"])
    assert base.verdict == "baseline" and (base.collapsed, x.collapsed) == (0, 1)
    assert x.verdict == "entropy higher, accuracy no difference found"
    assert x.means["avg_at_k"].n == 6


def test_a_runs_metrics_become_a_row() -> None:
    metrics = [
        {
            "step": i,
            "actor/entropy": 1.0 - 0.1 * i,
            "critic/rewards/mean": 0.1 * i,
            "theory/entropy_slope": -0.5 * (1 + i % 2),
            "theory/entropy_change_same_tokens": -0.1 * (1 + i % 2),
            "actor/updates": 4,
            "actor/lr": 0.1,
        }
        for i in range(8)
    ]
    metrics[0]["val-before/chain/avg@8"] = 0.3
    metrics[-1] |= {"val-core/chain/avg@8": 0.6, "val-core/chain/pass@8": 0.9}
    row = run_summary(metrics, "chain", 8)
    assert (row["start_avg_at_k"], row["avg_at_k"], row["pass_at_k"], row["collapsed"]) == (0.3, 0.6, 0.9, False)
    assert row["final_entropy"] == pytest.approx(0.5)
    assert (row["corr_token"], row["slope_token"], row["sign_token"]) == (1.0, 0.5, 1.0)
    assert entropy_agreement(metrics[:4]) == {}
    metrics[-1]["val-core/chain/avg@8"] = 0.2
    assert run_summary(metrics, "chain", 8)["collapsed"] is True
    assert run_summary([], "chain", 8, failed=True)["collapsed"] is True


def test_a_younger_field_leaves_committed_digests_valid() -> None:
    """The digest occurs in committed results; a setting with another value of the field has another digest."""
    assert results.digest(Setting(), LOSSES["GRPO"]) == "73a4fb2be3"
    assert results.digest(Setting(eps=1e-3), LOSSES["GRPO"]) != "73a4fb2be3"
