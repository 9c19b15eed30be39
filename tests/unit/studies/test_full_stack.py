"""Studies of whole runs: their settings are accepted, runs go seed by seed and resume, failures count as collapsed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes.checks.settings import load_checked
from recipes.studies import full_stack, results
from recipes.studies.full_stack import FULL_STUDIES, FullStudy, rehearsal
from recipes.studies.methods import LOSSES, overrides


@pytest.mark.parametrize(
    ("study", "method"),
    [
        (FULL_STUDIES["full_stack"], "eps_low 0.05"),
        (FULL_STUDIES["gpu"], "eps_high off"),
        (rehearsal(FULL_STUDIES["gpu"]), "CE-GPPO (0, 1)"),
        (FULL_STUDIES["staleness"], "partial 4"),
    ],
    ids=["full_stack", "gpu", "rehearsal", "staleness"],
)
def test_a_run_is_a_valid_configuration(study: FullStudy, method: str) -> None:
    config = load_checked([*study.words, *overrides(study.methods[method]), *study.method_words.get(method, ())])
    assert config.eval.n == study.k and study.k in config.eval.k
    stale = study is FULL_STUDIES["staleness"]
    assert (config.train.epochs, config.rollout.max_staleness, config.rollout.partial) == (
        *((1, 4, True) if stale else (4, 0, False)),
    )


def test_a_method_becomes_words() -> None:
    assert overrides(LOSSES["QAE 0.4"])[0] == "advantage.name=qae"
    assert overrides(LOSSES["eps_high off"])[:3] == ["loss=ppo", "loss.eps_low=0.2", "loss.eps_high=inf"]


def test_runs_come_seed_by_seed_and_a_failed_one_is_collapsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def train(command: list[str], **_: object) -> SimpleNamespace:
        run_dir = Path(next(w for w in command if w.startswith("run.dir=")).removeprefix("run.dir="))
        started.append(run_dir.name)
        fails = "eps_low" in run_dir.name
        metrics = [{"step": i, "actor/entropy": 0.5, "critic/rewards/mean": 0.4} for i in range(2)]
        metrics[-1] |= {} if fails else {"val-core/chain/avg@8": 0.7, "val-core/chain/pass@8": 0.9}
        run_dir.mkdir(parents=True)
        (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)) + "\n")
        if not fails:
            (run_dir / "hf").mkdir()
        return SimpleNamespace(returncode=int(fails))

    monkeypatch.setattr(full_stack.subprocess, "run", train)
    said: list[str] = []
    study, where = FULL_STUDIES["full_stack"], {"root": tmp_path / "results", "runs": tmp_path / "runs"}
    rows = full_stack.run("full_stack", study, **where, seeds=2, report=said.append)
    assert [name[-5:] for name in started] == ["seed0"] * 3 + ["seed1"] * 3
    assert [row["collapsed"] for row in rows] == [False, True, False] * 2 and "FAILED" in said[1]
    assert rows[0]["avg_at_k"] == 0.7 and rows[1]["avg_at_k"] is None
    assert rows[0].keys() >= {"date", "machine", "minutes", "command"} and "run.dir" not in rows[0]["command"]
    assert "advantage" not in rows[0]["command"] and "seed=0" in rows[0]["command"]
    assert full_stack.run("full_stack", study, **where, seeds=2) == rows and len(started) == 6
    curves = results.read(tmp_path / "results" / "curves" / "full_stack.jsonl")
    assert curves[0]["entropy"] == [0.5, 0.5] and curves[0]["clip_low"] == [None, None]
    full_stack.run("full_stack", study, **where, seeds=3, minutes=0, report=said.append)
    assert len(started) == 6 and "3 runs are left" in said[-1]
