"""Megatron checkpoint -> Hugging Face directory: `python -m conversion.megatron_to_hf --megatron DIR --out DIR`.

Reads what this project or Megatron itself saved in the `torch_dist` format, at any parallel layout. No Megatron is
needed here.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion import cli
from conversion.config import HFConfig
from conversion.hf_files import HFWriter, copy_side_files
from conversion.mapping import export_rows, hf_parts, hf_shapes
from conversion.megatron_reader import MegatronReader
from conversion.megatron_writer import Progress
from conversion.parallel import for_each
from conversion.parse import in_dialect
from conversion.publish import published, write_manifest
from conversion.values import Values

MAX_SHARD_SIZE = 5 * 10**9
CARD_KEYS = ("base_model", "recipe", "method", "step", "data", "command", "commit")


def convert(
    megatron_dir: str | Path,
    out: str | Path,
    *,
    hf_config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    threads: int = 1,
    overwrite: bool = False,
    card: Mapping[str, Any] | None = None,
    dialect: int | None = None,
    check_finite: bool = False,
    progress: Progress = lambda count: None,
) -> str:
    """Write `out` completely or not at all; a sentence on what was found in the numbers.

    What a manifest of the source promises is compared with the bytes as they are read.

    Args:
        check_finite: NaN and infinite numbers are an error.
        hf_config: directory with config.json, for checkpoints that do not bring their own.
        dialect: write config.json as transformers 4 or 5 does; None: as it was read.
        card: facts for the model card (`CARD_KEYS`); those in the checkpoint's manifest are the default.

    Raises:
        ValueError, OSError: what is wrong with the source or the destination, in one sentence.
    """
    reader, values = MegatronReader(megatron_dir, hf_config), Values(check_finite)
    dtypes = {part: dtype or reader.dtype(name) for name in reader.names() for part in hf_parts(reader.hf, name)}
    facts = {key: (reader.manifest or {}).get(key) for key in CARD_KEYS} | dict(card or {})

    def export(name: str) -> None:
        for start, block in reader.blocks(name):
            for part, row, rows in export_rows(reader.hf, name, start, block):
                writer.write(part, row, rows)
            progress(block.numel() * dtypes[next(iter(hf_parts(reader.hf, name)))].itemsize)

    with published(out, overwrite, [reader.directory, reader.hf_dir]) as partial:
        writer = HFWriter(partial, hf_shapes(reader.hf), dtypes, max_shard_size, values)
        try:
            for_each(export, reader.names(), threads)
            checked = reader.check_rest()
            digests = writer.finish()
        finally:
            writer.close()
        finish_directory(partial, reader.hf, reader.hf_dir, dtypes, facts, digests, dialect)
    return f"{checked}; {values.report()}"


def write_hf(
    out: str | Path,
    hf: HFConfig,
    hf_dir: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write a stream of full Hugging Face tensors (a running learner's) as a complete directory, one at a time.

    Args:
        hf_dir: where config.json, generation config and tokenizer are copied from.
        tensors: every tensor of `hf_shapes(hf)` once, in any order.
    """
    with published(out, overwrite) as partial:
        shapes = hf_shapes(hf)
        writer = HFWriter(partial, shapes, dict.fromkeys(shapes, dtype), max_shard_size)
        try:
            for name, tensor in tensors:
                writer.write(name, 0, tensor.detach().cpu())
            digests = writer.finish()
        finally:
            writer.close()
        finish_directory(partial, hf, Path(hf_dir), dict.fromkeys(shapes, dtype), dict(card or {}), digests)


def finish_directory(
    out: Path,
    hf: HFConfig,
    hf_dir: Path,
    dtypes: Mapping[str, torch.dtype],
    facts: Mapping[str, Any],
    digests: Mapping[str, str],
    dialect: int | None = None,
) -> None:
    """Everything but the weights: config, generation config, tokenizer, model card and manifest.

    config.json is copied byte for byte unless it says another dtype than the weights have, or a `dialect` is asked for.
    """
    copy_side_files(hf_dir, out)
    config = dict(hf.raw)
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = str(main_dtype(hf_shapes(hf), dtypes)).removeprefix("torch.")
    if dialect is not None:
        config = in_dialect(config, dialect)
    if config != hf.raw:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (out / "config.json").write_text(text, encoding="utf-8")
    (out / "README.md").write_text(_card(hf, facts), encoding="utf-8")
    write_manifest(out, tensors=digests, **{key: value for key, value in facts.items() if value is not None})


def main_dtype(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype of most numbers of a model: the one that config.json names."""
    counts: Counter[torch.dtype] = Counter()
    for name, shape in shapes.items():
        counts[dtypes[name]] += math.prod(shape)
    return counts.most_common(1)[0][0]


def _card(hf: HFConfig, facts: Mapping[str, Any]) -> str:
    head = ["---", "library_name: transformers"]
    if facts.get("base_model"):
        head.append(f"base_model: {json.dumps(facts['base_model'])}")
    lines = [
        *head,
        "---",
        "",
        f"# {facts.get('base_model') or hf.architecture} in Hugging Face format, exported by megatron-gppo",
        "",
    ]
    names = {"base_model": "Base model", "recipe": "Recipe", "method": "Method", "step": "Step", "data": "Data"}
    names |= {"command": "Command", "commit": "Code commit"}
    lines += [f"- {label}: {facts[key]}" for key, label in names.items() if facts.get(key) is not None]
    lines += [f"- Architecture: {hf.architecture}", "", "`manifest.json` holds a checksum of every tensor."]
    return "\n".join(lines) + "\n"


def add_export(parser: argparse.ArgumentParser) -> None:
    """The options of every export."""
    parser.add_argument("--max-shard-size", type=cli.size, default=MAX_SHARD_SIZE, help="e.g. 5GB (default), 500MiB")
    parser.add_argument("--config-dialect", type=int, choices=(4, 5), help="config.json as that transformers writes it")
    cli.add_common(parser)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conversion.megatron_to_hf", description=(__doc__ or "").strip())
    parser.add_argument("--megatron", required=True, metavar="DIR", help="Megatron checkpoint (torch_dist format)")
    parser.add_argument("--out", required=True, metavar="DIR", help="Hugging Face directory to write")
    parser.add_argument("--hf-config", metavar="DIR", help="directory with config.json, if the checkpoint has none")
    for key in CARD_KEYS:
        parser.add_argument(f"--{key.replace('_', '-')}", help="for the model card")
    add_export(parser)
    args = parser.parse_args()
    dtype = cli.DTYPES.get(args.dtype)
    reader = MegatronReader(args.megatron, args.hf_config)
    total = 0
    for name in reader.names():
        for shape in hf_parts(reader.hf, name).values():
            total += torch.Size(shape).numel() * (dtype or reader.dtype(name)).itemsize
    with cli.progress("Megatron -> Hugging Face", total) as advance:
        report = convert(
            args.megatron,
            args.out,
            hf_config=args.hf_config,
            dtype=dtype,
            max_shard_size=args.max_shard_size,
            threads=args.threads,
            overwrite=args.overwrite,
            card={key: value for key in CARD_KEYS if (value := getattr(args, key)) is not None},
            dialect=args.config_dialect,
            check_finite=args.check_finite,
            progress=advance,
        )
    print(report)
    return 0


if __name__ == "__main__":
    cli.run(main)
