"""Several processes write one checkpoint (threads here: they synchronise only through files)."""

from __future__ import annotations

import argparse
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import SIZES, contents, write_random

from conversion import hf_to_megatron, megatron_to_hf, units
from conversion.publish import working_directory
from conversion.together import ALONE, Team, team_of
from conversion.units import Work

RAW: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    **SIZES,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "mlp_only_layers": [0],
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_random(tmp_path / "source", RAW)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "SMALLEST", 2000)


def convert(
    source: Path, out: Path, world: int, ranks: list[int], *, converter: Any = hf_to_megatron, **more: Any
) -> list[Future[str]]:
    with ThreadPoolExecutor(world) as pool:
        teams = [Team(rank, world, "first", patience_s=more.pop("patience_s", 20.0)) for rank in ranks]
        return [pool.submit(converter.convert, source, out, team=team, **more) for team in teams]


@pytest.mark.parametrize("world", [2, 5])
@pytest.mark.parametrize("layout", ["flat", "megatron-lm"])
def test_together_they_write_the_bytes_that_one_writes(source: Path, tmp_path: Path, world: int, layout: str) -> None:
    done = convert(source, tmp_path / "in", world, list(range(world))[::-1], layout=layout, threads=2)
    assert "all numbers are finite" in done[-1].result() and all(future.result() for future in done)
    hf_to_megatron.convert(source, tmp_path / "alone", layout=layout, threads=3)
    assert contents(tmp_path / "in") == contents(tmp_path / "alone")
    assert sum(name.endswith(".distcp") for name in contents(tmp_path / "in")) > 5
    done = convert(
        tmp_path / "in", tmp_path / "back", world, list(range(world)), converter=megatron_to_hf, max_shard_size=6000
    )
    assert "all numbers are finite" in done[0].result() and all(future.result() for future in done)
    megatron_to_hf.convert(tmp_path / "in", tmp_path / "back alone", max_shard_size=6000)
    assert contents(tmp_path / "back") == contents(tmp_path / "back alone")
    before = load_file(source / "model.safetensors")
    after = {n: t for path in (tmp_path / "back").glob("*.safetensors") for n, t in load_file(path).items()}
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".") and path.name != ".metadata"]


def test_an_error_of_any_rank_ends_all_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Work.run

    def breaks(self: Work, partial: Path, rank: int, *args: Any) -> int:
        if rank == 1:
            raise OSError("the disk of rank 1 is gone")
        return run(self, partial, rank, *args)

    monkeypatch.setattr(Work, "run", breaks)
    first, second = convert(source, tmp_path / "out", 2, [0, 1])
    with pytest.raises(ValueError, match="rank 1: the disk of rank 1 is gone"):
        first.result()
    with pytest.raises(OSError, match="is gone"):
        second.result()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_rank_that_never_comes_is_missed(source: Path, tmp_path: Path) -> None:
    (alone,) = convert(source, tmp_path / "out", 2, [0], patience_s=0.5)
    with pytest.raises(ValueError, match=r"rank 1 has sent no heartbeat for"):
        alone.result()
    (early,) = convert(source, tmp_path / "out", 2, [1], patience_s=0.5)
    with pytest.raises(ValueError, match="rank 0 did not begin"):
        early.result()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_another_attempt_is_not_joined(source: Path, tmp_path: Path) -> None:
    partial = working_directory(tmp_path / "out")
    partial.mkdir(parents=True)
    Team(0, 2, "killed").open(partial)
    with pytest.raises(ValueError, match="rank 0 did not begin"):
        Team(1, 2, "new", patience_s=0.3).join(tmp_path / "out")


def test_the_place_comes_from_srun_or_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(**given: Any) -> Team:
        return team_of(argparse.Namespace(**{"rank": None, "world": None, "attempt": None, **given}))

    for name in ("SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert place() == ALONE and place(rank=1, world=2, attempt="a") == Team(1, 2, "a")
    for given, words in (({"rank": 2, "world": 2, "attempt": "a"}, "between 0 and 1"), ({"world": 2}, "--attempt")):
        with pytest.raises(ValueError, match=words):
            place(**given)
    for name, value in (("NTASKS", "4"), ("STEP_ID", "7"), ("PROCID", "3"), ("JOB_ID", "12")):
        monkeypatch.setenv("SLURM_" + name, value)
    assert place() == Team(3, 4, "12.7.0") and place(world=1) == ALONE
