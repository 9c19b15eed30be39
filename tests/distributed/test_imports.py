"""Allowed imports of each part, checked in a new interpreter (one for all: importing torch takes most of the time)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib, sys, torch

def imported(names):
    before = set(sys.modules)
    for name in names:
        importlib.import_module(name)
    return set(sys.modules) - before

def refuse(found, *roots):
    bad = sorted(m for m in found if any(m == root or m.startswith(root + ".") for root in roots))
    assert not bad, bad

big = "megatron", "vllm", "transformers"
mathematics = imported(MODULES)
refuse(mathematics, *big, "recipes")
refuse({m for m in mathematics if not m.startswith("megatron_ext.rl")} - {"megatron_ext"}, "megatron_ext")
refuse(imported(["megatron_ext.kernels"]), *big, "recipes", "torch.distributed")
adapters = ["megatron_ext.integrations." + name for name in ("padded", "nemo_aligner", "trl", "verl")]
refuse(imported(adapters), *big, "nemo_aligner", "trl", "verl", "megatron_ext.learner", "configs", "recipes")
refuse(imported(["conversion"]), *big, "megatron_ext.learner")
refuse(imported(["conversion.hf_to_megatron", "conversion.megatron_to_hf", "conversion.inspect"]), *big)
"""


def test_no_part_imports_what_it_must_not() -> None:
    paths = (ROOT / "megatron_ext" / "rl").rglob("*.py")
    parts = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    modules = sorted(part.removesuffix(".__init__") for part in parts)
    assert len(modules) > 20
    program = PROGRAM.replace("MODULES", repr(modules))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
