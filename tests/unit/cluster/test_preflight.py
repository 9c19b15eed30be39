"""The node check: faults that it refuses, each with one sentence that names the node, and states that it accepts."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path
from typing import Any

import pytest

from recipes.cluster import preflight
from recipes.cluster.attempt import events
from recipes.cluster.preflight import Needs, code_digest, main, problems

BEGAN, ENDED = 1000.0, 1010.0
GPU = {"name": "NVIDIA H100", "gib": 80.0, "used_gib": 0.1, "ecc": 0}


def node(name: str, **changes: Any) -> dict[str, Any]:
    facts = {"node": name, "time": 1004.0, "gpus": [dict(GPU)] * 8, "driver": "570.1", "gpu_problem": ""}
    versions = {"torch": "2.11", "megatron-core": "0.16.1", "vllm": "0.32.0"}
    facts |= {"nonce": "abc", "run_gib": 900.0, "tmp_gib": 100.0, "shm_gib": None, "versions": versions}
    return facts | {"packages": "p", "code": "c"} | changes


def refusals(*nodes: dict[str, Any], gpus: int = 8) -> list[str]:
    return problems(nodes, Needs(["a", "b"], gpus, "abc", 20.0, BEGAN, ENDED))


def test_healthy_nodes_pass() -> None:
    assert refusals(node("a"), node("b")) == []
    late_start = node("b", time=ENDED - 0.1)  # ten seconds for importing Python is not a clock error
    assert refusals(node("a"), late_start) == []
    assert refusals(node("a", gpus=[]), node("b", gpus=[]), gpus=0) == []


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"nonce": None, "shared_error": "No such file"},
            "b: does not see the run directory (No such file); put run.dir",
        ),
        ({"nonce": "other"}, "b: does not see the run directory (different content there)"),
        ({"run_gib": 3.25}, "b: 3.2 GiB free for the run directory, 20 needed"),
        ({"gpus": [GPU] * 7}, "b: 7 GPUs, 8 needed; submit with --exclude=b"),
        ({"gpus": [], "gpu_problem": "nvidia-smi does not answer within 60 s"}, "b: nvidia-smi does not answer"),
        ({"gpus": [GPU] * 7 + [GPU | {"ecc": 2}]}, "b: GPU 7 has 2 uncorrected memory errors; submit with --exclude=b"),
        ({"gpus": [GPU | {"used_gib": 60.0}] + [GPU] * 7}, "b: GPU 0 already holds 60 GiB of another process"),
        ({"time": BEGAN - 90}, "b: its clock is off by 90 s or more"),
        ({"time": ENDED + 61}, "b: its clock is off by 61 s or more"),
        ({"code": "d"}, "b: another source code than on the other nodes"),
        ({"packages": "q"}, "b: another installed packages than on the other nodes"),
        ({"driver": "550.2"}, "b: another GPU driver than on the other nodes"),
    ],
)
def test_each_fault_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    (found,) = refusals(node("a"), node("b", **changes), node("c"))
    assert found.startswith(sentence)


def test_silent_nodes_are_named() -> None:
    (found,) = refusals(node("a"))
    assert found.startswith("no answer from b:")


def test_a_node_looks_at_itself_and_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nonce").write_text("abc")
    monkeypatch.setenv("SLURMD_NODENAME", "a")
    assert main(["node", str(tmp_path)]) == 0
    (facts,) = preflight.read_facts(tmp_path, ["a"], 0.0)
    assert facts["nonce"] == "abc" and facts["run_gib"] > 0
    monkeypatch.setattr("sys.stdin", io.StringIO("slurmstepd: noise\npreflight: c: No such file or directory\n"))
    monkeypatch.setattr(preflight, "VISIBLE_S", 0.0)
    # Whatever this machine's GPUs and disk are, only the missing nodes are refused.
    assert main(["judge", str(tmp_path), "--nodes", "a,b,c", "--began", str(facts["time"])]) == 3
    out = capsys.readouterr().out
    assert "slurmstepd: noise" in out and out.count("error: ") == 2
    assert "error: c: does not see the run directory (No such file or directory); put run.dir" in out
    assert "error: no answer from b" in out
    assert {event.role for event in events(tmp_path)} == {"preflight"}


def test_a_node_that_cannot_write_says_so_in_one_short_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "a")
    assert main(["node", str(tmp_path / "absent")]) == 1
    printed = capsys.readouterr().out
    assert preflight.blind_nodes(printed, ["a"]) == {"a": "No such file or directory"}
    assert printed.count("\n") == 1 and len(printed) < 200


def test_code_digest_sees_a_changed_file(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "a.py").write_text("x = 1\n")
    before = code_digest(tmp_path)
    (tmp_path / "recipes" / "a.py").write_text("x = 2\n")
    assert code_digest(tmp_path) != before


def test_what_nvidia_smi_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "NVIDIA H100 80GB HBM3, 570.124.06, 81559, 4, 0\nNVIDIA H100 80GB HBM3, 570.124.06, 81559, 40960, [N/A]\n"
    monkeypatch.setattr(preflight.shutil, "which", lambda name: f"/usr/bin/{name}")
    done = subprocess.CompletedProcess([], 0, stdout=answer)
    monkeypatch.setattr(preflight.subprocess, "run", lambda *_, **__: done)
    gpus, driver, problem = preflight.gpu_facts()
    assert [round(gpu["used_gib"]) for gpu in gpus] == [0, 40] and [gpu["ecc"] for gpu in gpus] == [0, 0]
    assert (driver, problem, round(gpus[0]["gib"])) == ("570.124.06", "", 80)

    def hangs(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 60)

    monkeypatch.setattr(preflight.subprocess, "run", hangs)
    assert preflight.gpu_facts() == ([], "", "nvidia-smi does not answer within 60 s")
