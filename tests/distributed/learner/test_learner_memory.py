"""The memory plan must agree with the measured memory of an optimizer step.

The benchmark of the same name measures a larger model in more settings. Two processes, started once.
"""

from __future__ import annotations

import json
from pathlib import Path

import gloo
import pytest

from benchmarks import learner_memory as benchmark

TOKENS = 512
SIZES = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 4096}
SETTINGS = {
    "base": ("", 1),
    "whole logits": ("train.loss_chunk_tokens=100000", 1),
    "recompute": ("model.recompute=true", 1),
    "recompute the MLP": ("model.recompute=true model.recompute_modules=[mlp]", 1),
    "tp 2": ("parallel.tp=2", 2),
    "tp 2, sp": ("parallel.tp=2 parallel.sp=true", 2),
    "pp 2": ("parallel.pp=2", 2),
    "cp 2": ("parallel.cp=2", 2),
    "dp 2, distributed optimizer": ("parallel.nproc=2 optim.distributed=true", 2),
}


ONE_STEP = ("train.mini_batch_prompts=999",)


def _words(name: str, root: Path) -> list[str]:
    overrides, processes = SETTINGS[name]
    small = [f"train.micro_batch_tokens={TOKENS}", f"rollout.prompts_per_step={8 * processes}", *ONE_STEP]
    return [f"model.path={root / 'model'}", *benchmark.BASE.split(), *small, *overrides.split()]


def _process(rank: int, root: Path) -> None:
    for number, (name, (_, processes)) in enumerate(SETTINGS.items()):
        if rank < processes:
            with gloo.group(rank, processes, root / f"store-{number}"):
                measured = benchmark.measure(_words(name, root))
            (root / f"{name}.{rank}.json").write_text(json.dumps(measured))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    benchmark.make_model(root / "model", **SIZES)
    gloo.run(2, _process, root, timeout_s=300)
    return root


@pytest.mark.parametrize("name", SETTINGS)
def test_plan_and_measurement_agree(root: Path, name: str) -> None:
    """Parameters, gradients and optimizer state within 1 % (buffers are padded), the backward pass within 20 %."""
    ranks = [json.loads((root / f"{name}.{rank}.json").read_text()) for rank in range(SETTINGS[name][1])]
    measured = max(ranks, key=lambda parts: sum(parts.values()))
    planned = benchmark.planned(_words(name, root))
    assert measured.keys() == planned.keys()
    for part, size in planned.items():
        assert measured[part] == pytest.approx(size, rel=0.2 if part == benchmark.LIVE else 0.01), part
