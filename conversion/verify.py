"""Compare two checkpoints of any kind: `python -m conversion.verify A B`; or one with its manifest: `verify A`.

Weights are compared bit for bit, configurations in everything that changes results, and logits on fixed prompts in
float32. Status 0 when all is equal and every number is finite, 1 otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conversion import cli
from conversion.config import HFConfig
from conversion.mapping import export_rows, hf_parts, hf_shapes, megatron_names, megatron_shape, row_unit
from conversion.parallel import for_each
from conversion.parse import in_dialect
from conversion.publish import check_manifest
from conversion.sources import Source, open_source
from conversion.values import Values

BLOCK_BYTES = 1 << 22  # of each checkpoint in memory at a time, per thread
LOGITS = "megatron_ext.learner.logits"  # a command, not an import: conversion does not depend on the learner
# Keys of config.json that do not affect a model's results here. Dropout is always 0 in reinforcement learning.
_HARMLESS = {"_name_or_path", "attention_dropout", "dtype", "initializer_range", "pretraining_tp", "residual_dropout"}
_HARMLESS |= {"transformers_version", "use_cache", "architectures", "model_type", "torch_dtype", "auto_map"}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Difference:
    """The differences of one Hugging Face tensor, over all its blocks."""

    order: int
    count: int = 0
    worst: float = -1.0
    place: tuple[int, ...] = ()

    def add(self, row: int, ours: Tensor, theirs: Tensor) -> None:
        """Rows from `row` on, of equal shape and dtype."""
        gap = (ours.double() - theirs.double()).abs().nan_to_num(nan=torch.inf).flatten()
        at = int(gap.argmax())
        self.count += int((ours.contiguous().view(_bits(ours)) != theirs.contiguous().view(_bits(theirs))).sum())
        if gap[at].item() > self.worst:
            self.worst = gap[at].item()
            inside = torch.unravel_index(torch.tensor(at), ours.shape)
            self.place = tuple(int(i) + (row if axis == 0 else 0) for axis, i in enumerate(inside))


@dataclass
class Comparison:
    """The result; `first` describes the first tensor that differs, in the order of a forward pass."""

    compared: int = 0
    different: int = 0
    first: str = ""
    config: list[str] = field(default_factory=list)  # what differs and changes results
    harmless: list[str] = field(default_factory=list)  # keys of config.json that differ otherwise
    values: Values = field(default_factory=Values)  # numbers that are not finite, in either

    @property
    def equal(self) -> bool:
        return not (self.different or self.config or self.values.nonfinite)


def _bits(tensor: Tensor) -> torch.dtype:
    return _BITS[tensor.element_size()]


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Equal bits of two tensors of one dtype and shape (NaNs and the sign of zero included)."""
    return torch.equal(a.view(_bits(a)), b.view(_bits(b)))


def config_differences(a: HFConfig, b: HFConfig) -> tuple[list[str], list[str]]:
    """Differences that affect results, as sentences; and keys of config.json with other differences.

    A key that only one file has counts as the default in the other, unless conversion knows it.
    """
    names = [f.name for f in dataclasses.fields(HFConfig) if f.name != "raw"]
    changed = [f"{n}: {x!r} against {y!r}" for n in names if (x := getattr(a, n)) != (y := getattr(b, n))]
    ours, theirs = (in_dialect(hf.raw, 5) for hf in (a, b))
    odd = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if not changed:  # else the same difference would be told twice
        both = [key for key in odd if key in ours and key in theirs and key not in _HARMLESS | {"rope_parameters"}]
        changed = [f"{key}: {ours[key]!r} against {theirs[key]!r}" for key in both]
    return changed, [key for key in odd if not any(line.startswith(key + ":") for line in changed)]


def _blocks(hf: HFConfig, name: str) -> Iterator[tuple[int, int]]:
    rows, *rest = megatron_shape(hf, name)
    unit = row_unit(hf, name)
    step = max(BLOCK_BYTES // (4 * math.prod(rest) * unit), 1) * unit
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def compare(a: Source, b: Source, threads: int = 1) -> Comparison:
    """Compare two checkpoints block by block; ValueError when they are not of the same model, or one is damaged."""
    if hf_shapes(a.hf) != hf_shapes(b.hf):
        odd = sorted(set(hf_shapes(a.hf).items()) ^ set(hf_shapes(b.hf).items()))
        raise ValueError(f"the checkpoints are of different models: {odd[0][0]} has another shape or is in one only")
    changed, harmless = config_differences(a.hf, b.hf)
    result = Comparison(config=changed, harmless=harmless)
    order = {part: number for number, part in enumerate(hf_shapes(a.hf))}
    ours, theirs = a.dtypes(), b.dtypes()
    other_dtype = {part for part in order if ours[part] != theirs[part]}
    found: dict[str, Difference] = {}
    lock = threading.Lock()

    def check(name: str) -> None:
        for start, stop in _blocks(a.hf, name):
            x, y = a.rows(name, start, stop), b.rows(name, start, stop)
            parts = list(zip(export_rows(a.hf, name, start, x), export_rows(a.hf, name, start, y), strict=True))
            for (part, _, mine), (_, _, yours) in parts:
                result.values.cast(part, mine, mine.dtype)
                result.values.cast(part, yours, yours.dtype)
            if other_dtype.isdisjoint(hf_parts(a.hf, name)) and not bits_equal(x, y):
                for (part, row, mine), (_, _, yours) in parts:
                    if not bits_equal(mine.contiguous(), yours.contiguous()):
                        with lock:
                            found.setdefault(part, Difference(order[part])).add(row, mine, yours)

    for_each(check, megatron_names(a.hf), threads)
    for source in (a, b):
        source.check_rest()
    result.compared, result.different = len(order), len(found) + len(other_dtype)
    odd_parts = sorted({*found, *other_dtype}, key=order.__getitem__)
    if odd_parts and (part := odd_parts[0]) in other_dtype:
        result.first = f"{part}: {ours[part]} against {theirs[part]}"
    elif odd_parts:
        total, gap = math.prod(hf_shapes(a.hf)[part]), found[part]
        result.first = f"{part}: {gap.count} of {total} values differ, most by {gap.worst:.3e} at {gap.place}"
    return result


def scan(source: Source, threads: int = 1) -> Values:
    """Read every weight of one checkpoint and count non-finite numbers. ValueError if one differs from its manifest."""
    values = Values()

    def check(name: str) -> None:
        for start, stop in _blocks(source.hf, name):
            for part, _, rows in export_rows(source.hf, name, start, source.rows(name, start, stop)):
                values.cast(part, rows, rows.dtype)

    for_each(check, megatron_names(source.hf), threads)
    source.check_rest()
    return values


def logits_agree(a: str, b: str, hf_config: str | None, tolerance: float) -> bool:
    """Whether the models compute the same on fixed prompts, by a command of the learner, which can run both kinds."""
    command = [sys.executable, "-m", LOGITS, a, b, "--tolerance", str(tolerance)]
    sys.stdout.flush()
    return subprocess.run(command + (["--hf-config", hf_config] if hf_config else []), check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conversion.verify", description=(__doc__ or "").strip())
    parser.add_argument("a", help="Hugging Face or Megatron directory")
    parser.add_argument("b", nargs="?", help="directory to compare it with")
    parser.add_argument("--hf-config", metavar="DIR", help="config.json for Megatron checkpoints that have none")
    parser.add_argument("--allow-pickle", action="store_true", help="read *.bin weights, with weights_only=True")
    parser.add_argument("--no-logits", action="store_true", help="compare weights only, in bounded memory")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit (%(default)s)")
    parser.add_argument("--threads", type=cli.positive, default=cli.default_threads(), help="default: %(default)s")
    args = parser.parse_args()
    sources = [open_source(path, args.hf_config, allow_pickle=args.allow_pickle) for path in (args.a, args.b) if path]
    alone = len(sources) == 1
    for source in sources:
        manifest = check_manifest(source.directory, contents=alone)
        values = scan(source, args.threads) if alone else Values()
        verdict = "no manifest"
        if manifest is not None:
            counts = f"({len(manifest['files'])} files, {len(manifest.get('tensors', {}))} tensors)"
            verdict = f"manifest verified {counts}" if alone else f"manifest {counts} checked while reading"
        print(f"{source.directory}: {source.kind}, {source.hf.architecture}, {verdict}")
    if alone:
        print(f"weights: {values.report()}")
        return int(bool(values.nonfinite))
    found = compare(sources[0], sources[1], args.threads)
    if found.harmless:
        print(f"config.json differs without consequence in: {', '.join(found.harmless)}")
    for line in found.config:
        print(f"config.json differs in {line}")
    if found.different:
        print(f"weights: {found.different} of {found.compared} tensors differ, first {found.first}")
    else:
        print(f"weights: all {found.compared} tensors are equal bit for bit, {found.values.report()}")
    agree = args.no_logits or logits_agree(args.a, args.b, args.hf_config, args.tolerance)
    return int(not (found.equal and agree))


if __name__ == "__main__":
    cli.run(main)
