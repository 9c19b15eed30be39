"""Partial rollouts with the local engine: versions, replay bit for bit, and a resume that loses no problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training import assert_same_run, journal, metrics, run_here

from recipes.train import StopSignal

STEPS = 4
PARTIAL = (
    "rollout.partial=true",
    "rollout.max_staleness=2",
    "train.tis_cap=2",
    "rollout.max_tokens=24",
    "eval.every=0",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from recipes.models.prepare import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=0)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.loop.run_dir import RunDir

    monkeypatch.setattr(RunDir, "_report", lambda self: self.path / "report.html")


def batches(run: Path) -> list[dict[str, Any]]:
    return [record for record in journal(run) if record["kind"] == "rollouts"]


def problems(run: Path) -> list[str]:
    return [group["problem"] for record in batches(run) for group in record["groups"]]


def test_long_responses_go_on_over_updates(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_here(model, tmp_path / "run", *PARTIAL)
    records = batches(run)
    assert [len(record["groups"]) for record in records] == [4] * STEPS
    cut = 0
    for step, record in enumerate(records):
        for versions in (r["versions"] for group in record["groups"] for r in group["responses"]):
            assert versions == sorted(versions) and set(versions) <= set(range(max(0, step - 2), step + 1))
            cut += len(set(versions)) > 1
    assert cut, "no response was cut by an update"
    rows = metrics(run)
    assert any(row["rollout/staleness"] > 0 for row in rows)
    # Tokens of the step's own version, in the middle of a response too, have the learner's log-probabilities.
    assert max(row.get("rollout_agreement/abs_dp_mean", 0.0) for row in rows) < 1e-6
    assert [len(record["open"]) for record in records] == [4, 4, 4, 0], "nothing is begun for no step"
    assert_same_run(run_here(model, tmp_path / "replay", *PARTIAL, f"rollout.replay={run}"), run)

    calls = iter(range(STEPS))
    monkeypatch.setattr(StopSignal, "requested", property(lambda self: next(calls) == 1))
    stopped = run_here(model, tmp_path / "stopped", *PARTIAL)
    assert len(batches(stopped)) == 2 and len(batches(stopped)[1]["open"]) == 4
    run_here(model, stopped, *PARTIAL)
    assert [row["step"] for row in metrics(stopped)] == [1, 2, 3, 4]
    assert sorted(problems(stopped)) == sorted(problems(run)), "what was open is begun anew, and nothing is passed over"
