"""Numbers that are not finite: weights are unchanged, samples are named, and skipped updates stay skipped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import arguments, assert_same_run, journal, launch_here, metrics, run_here, weights

from recipes import train

pytestmark = pytest.mark.usefixtures("no_report")
SETTINGS = ("eval.every=0", "train.entropy_probe_every=0", "train.save_every=1")


def poison(monkeypatch: pytest.MonkeyPatch, what: str, when: Callable[[int], bool]) -> None:
    """Make ``what`` ("loss" | "gradient") not finite in the updates whose number ``when`` accepts, counted from 0."""
    build, made = train.build_loss, [0]

    class Poisoned:
        def __init__(self, loss: Any) -> None:
            self._loss, self._updates = loss, 0
            self._begin, made[0] = made[0], made[0] + 2

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["_loss"], name)

        def __call__(self, inputs: Any) -> Any:
            out, number = self._loss(inputs), self._begin + self._updates
            self._updates += 1
            if not when(number):
                return out
            if what == "loss":
                return replace(out, loss=out.loss * torch.nan)
            bad = out.loss * 1.0
            if bad.requires_grad:
                bad.register_hook(lambda gradient: gradient * torch.inf)
            return replace(out, loss=bad)

    monkeypatch.setattr(train, "build_loss", lambda *args, **kwargs: Poisoned(build(*args, **kwargs)))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_default_stops_with_the_samples(
    what: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, what, lambda number: number == 3)
        assert launch_here(arguments(model, run, *SETTINGS)) == 5
    (row,) = map(json.loads, (run / "quarantine.jsonl").read_text().splitlines())
    assert (row["step"], row["update"]) == (1, 1) and what in row["what"]
    problems = [group["problem"] for group in [r for r in journal(run) if r["kind"] == "rollouts"][1]["groups"]]
    assert [sample.partition("#")[0] for sample in row["samples"]] == [p for p in problems[2:] for _ in range(4)]
    said = capsys.readouterr().err
    assert said.startswith("error: step 2, update 2: not finite: ") and row["samples"][0] in said
    assert "train.nonfinite=skip continues without this batch" in said
    assert (run / "checkpoints" / "latest").read_text() == "step_000001\n", "nothing after it is saved"
    run_here(model, run, *SETTINGS)  # repaired: continues
    assert len(metrics(run)) == 4


def test_skipping_leaves_the_weights_and_is_repeated_without_computing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip = (*SETTINGS, "train.nonfinite=skip")
    run, again = tmp_path / "run", tmp_path / "again"
    with monkeypatch.context() as patch:
        poison(patch, "gradient", lambda number: number == 3)
        run_here(model, run, *skip)
    assert [row.get("actor/nonfinite_updates") for row in metrics(run)] == [None, 1, None, None]
    assert metrics(run)[1]["actor/updates"] == 1
    again.mkdir()
    shutil.copyfile(run / "quarantine.jsonl", again / "quarantine.jsonl")
    run_here(model, again, *skip, f"rollout.replay={run}")  # it would be finite now
    assert_same_run(run, again)
    with monkeypatch.context() as patch:
        poison(patch, "loss", lambda number: True)
        run_here(model, tmp_path / "all", *skip, "train.steps=1")
    before, after = load_file(model / "model.safetensors"), weights(tmp_path / "all")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items() if name in before)


def test_too_many_in_a_row_end_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, "loss", lambda number: number >= 2)
    words = arguments(model, tmp_path / "run", *SETTINGS, "train.nonfinite=skip")
    assert launch_here(words) == 5
    assert "step 3, update 1: " in (said := capsys.readouterr().err) and "3 batches in a row" in said
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 3


def test_a_reward_that_is_not_finite_sets_the_batch_aside(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipes.loop.collect import Collector

    judge = Collector._judge

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        samples = judge(self, *args, **kwargs)
        samples[0].reward = float("nan")
        return samples

    monkeypatch.setattr(Collector, "_judge", poisoned)
    run = tmp_path / "run"
    assert launch_here(arguments(model, run, *SETTINGS, "train.nonfinite=skip", "train.nonfinite_in_a_row=9")) == 0
    rows = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["step"], row["update"], row["what"], len(row["samples"])) for row in rows] == [
        (step, -1, "reward", 1) for step in range(4)
    ]
