"""Compare two checkpoints of any kind: `python -m conversion.verify A B`; or one with its manifest: `verify A`.

Weights are compared bit for bit, and logits on fixed prompts in float32. Status 0 when all is equal, 1 otherwise.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conversion import cli
from conversion.digests import data_matches
from conversion.mapping import hf_shapes, megatron_names
from conversion.publish import check_manifest
from conversion.sources import Source, open_source

LOGITS = "megatron_ext.learner.logits"  # a command, not an import: conversion knows nothing of the learner
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Comparison:
    """What was found; `first` describes the first tensor that differs."""

    compared: int = 0
    different: int = 0
    first: str = ""
    config: list[str] = field(default_factory=list)  # keys of config.json that differ


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits (NaNs and the sign of zero included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.view(_BITS[a.element_size()]), b.view(_BITS[b.element_size()]))


def describe(name: str, a: Tensor, b: Tensor) -> str:
    """One sentence on how two different tensors differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{name}: {a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
    difference = (a.double() - b.double()).abs().flatten()
    worst = int(difference.nan_to_num(nan=torch.inf).argmax())
    count = int((a.view(_BITS[a.element_size()]) != b.view(_BITS[b.element_size()])).sum())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), a.shape))
    return f"{name}: {count} of {a.numel()} values differ, most by {difference[worst].item():.3e} at {place}"


def compare(a: Source, b: Source) -> Comparison:
    """Compare two checkpoints parameter by parameter; ValueError when they are not of the same model."""
    if hf_shapes(a.hf) != hf_shapes(b.hf):
        odd = sorted(set(hf_shapes(a.hf).items()) ^ set(hf_shapes(b.hf).items()))
        raise ValueError(f"the checkpoints are of different models: {odd[0][0]} has another shape or is in one only")
    keys = sorted(set(a.hf.raw) | set(b.hf.raw))
    result = Comparison(config=[key for key in keys if a.hf.raw.get(key) != b.hf.raw.get(key)])
    for name in megatron_names(a.hf):
        for (part, ours), (_, theirs) in zip(a.tensors(name), b.tensors(name), strict=True):
            result.compared += 1
            if not bits_equal(ours, theirs):
                result.different += 1
                result.first = result.first or describe(part, ours, theirs)
    return result


def check_own_manifest(source: Source) -> str:
    """Recompute every checksum of a directory's manifest; ManifestError (a ValueError) names what differs."""
    manifest = check_manifest(source.directory, contents=True)
    if manifest is None:
        return "no manifest"
    tensors = manifest.get("tensors", {})
    for name in megatron_names(source.hf) if tensors else []:
        for part, tensor in source.tensors(name):
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            if part not in tensors or not data_matches(data, tensors[part]):
                raise ValueError(f"tensor {part!r} in {source.directory} does not have the bytes its manifest promises")
    return f"manifest verified ({len(manifest['files'])} files, {len(tensors)} tensors)"


def logits_agree(a: str, b: str, hf_config: str | None, tolerance: float) -> bool:
    """Whether the models compute the same on fixed prompts: a command of the learner, which knows how to run both."""
    command = [sys.executable, "-m", LOGITS, a, b, "--tolerance", str(tolerance)]
    sys.stdout.flush()
    return subprocess.run(command + (["--hf-config", hf_config] if hf_config else []), check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conversion.verify", description=(__doc__ or "").strip())
    parser.add_argument("a", help="Hugging Face or Megatron directory")
    parser.add_argument("b", nargs="?", help="directory to compare it with")
    parser.add_argument("--hf-config", metavar="DIR", help="config.json for Megatron checkpoints that have none")
    parser.add_argument("--allow-pickle", action="store_true", help="read *.bin weights, with weights_only=True")
    parser.add_argument("--no-logits", action="store_true", help="compare weights only")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit (%(default)s)")
    args = parser.parse_args()
    sources = [open_source(path, args.hf_config, allow_pickle=args.allow_pickle) for path in (args.a, args.b) if path]
    for source in sources:
        print(f"{source.directory}: {source.kind}, {source.hf.architecture}, {check_own_manifest(source)}")
    if len(sources) == 1:
        return 0
    a, b = sources
    found = compare(a, b)
    if found.config:
        print(f"config.json differs in: {', '.join(found.config)}")
    if found.different:
        print(f"weights: {found.different} of {found.compared} tensors differ, first {found.first}")
    else:
        print(f"weights: all {found.compared} tensors are equal bit for bit")
    failed = found.different > 0
    if not args.no_logits:
        failed |= not logits_agree(args.a, args.b, args.hf_config, args.tolerance)
    return int(failed)


if __name__ == "__main__":
    cli.run(main)
