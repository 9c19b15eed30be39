"""Whole runs on a GPU: quick start, layouts over NCCL, a checkpoint from a CPU, colocated mode."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SHORT = ["recipe=quickstart", "train.steps=3", "train.save_every=0", "eval.problems=16", "eval.n=2", "eval.k=[1]"]


def train(run_dir: Path, *arguments: str, hide_gpu: bool = False) -> list[dict[str, Any]]:
    """`python -m recipes.train` in a process of its own; the lines of its metrics."""
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})}
    command = [sys.executable, "-m", "recipes.train", *SHORT, f"run.dir={run_dir}", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A short run with the local engine, whose rollouts the others replay."""
    run_dir = tmp_path_factory.mktemp("gpu") / "recorded"
    return run_dir, train(run_dir, "rollout.engine=local")


def close(a: list[dict[str, Any]], b: list[dict[str, Any]], tolerance: float) -> None:
    for mine, other in zip(a, b, strict=True):
        for key in ("actor/entropy", "actor/pg_loss", "actor/grad_norm"):
            assert mine[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), key


def test_the_quick_start_trains(recorded: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = recorded[1]
    assert len(rows) == 3 and all(0 < row["actor/entropy"] < 4 for row in rows)
    assert all(row["rollout_agreement/abs_dp_mean"] < 1e-3 for row in rows)


def test_a_replay_on_the_cpu_gives_the_same(recorded: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    close(train(tmp_path / "cpu", f"rollout.replay={recorded[0]}", hide_gpu=True), recorded[1], 1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_a_cpu_continues_on_a_gpu(
    recorded: tuple[Path, list[dict[str, Any]]], tmp_path: Path, dtype: str
) -> None:
    """Two steps on the CPU (torch's Adam, our layers), the third here (Transformer Engine's, when it is installed)."""
    replay = [f"rollout.replay={recorded[0]}", f"model.dtype={dtype}", "rollout.agreement_limit=1"]
    whole = train(tmp_path / "whole", *replay)
    train(tmp_path / "half", *replay, "train.steps=2", "train.save_every=2", hide_gpu=True)
    continued = train(tmp_path / "half", *replay)
    close(continued[2:], whole[2:], 0.02 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.pp=2", "parallel.nproc=2", "parallel.cp=2"])
def test_layouts_over_nccl(recorded: tuple[Path, list[dict[str, Any]]], tmp_path: Path, layout: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    close(train(tmp_path / "run", f"rollout.replay={recorded[0]}", layout), recorded[1], 1e-3)


def test_colocated_mode_with_vllm(tmp_path: Path) -> None:
    """Servers sleep and wake around three steps; what they generate agrees with the learner after every turn."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    memory = ["rollout.gpu_memory_utilization=0.3", "model.dtype=bfloat16", "rollout.dtype=bfloat16"]
    memory += ["rollout.extra_args=[--enforce-eager]"]  # half the start of a server
    rows = train(tmp_path / "run", "rollout.engine=vllm", "rollout.colocated=true", *memory)
    assert len(rows) == 3 and all(row["rollout_agreement/abs_dp_mean"] < 0.01 for row in rows)
