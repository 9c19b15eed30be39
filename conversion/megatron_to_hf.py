"""Megatron checkpoint -> Hugging Face directory: `python -m conversion.megatron_to_hf --megatron DIR --out DIR`.

Reads what this project or Megatron itself saved in the `torch_dist` format, at any parallel layout. No Megatron is
needed here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion import bridge, cli
from conversion.config import HFConfig
from conversion.hf_files import HFWriter, copy_side_files, refuse_foreign_links
from conversion.locate import require
from conversion.mapping import export_rows, hf_parts, hf_shapes, megatron_shape, stored_dtype
from conversion.megatron_reader import BLOCK_BYTES, HF_FILES, MegatronReader
from conversion.megatron_writer import Progress
from conversion.parse import in_dialect
from conversion.publish import published, write_manifest
from conversion.quantised import QUANTISATION
from conversion.together import ALONE, Team, add_team, team_of
from conversion.units import Record, Unit, Work, cut, job, kept_report, listing, require_unchanged
from conversion.values import Values, nonfinite_report

MAX_SHARD_SIZE = 5 * 10**9
CARD_KEYS = ("base_model", "recipe", "method", "step", "data", "command", "commit")


class _UnitWriter:
    """Writes units of a model into the files of a Hugging Face directory; safe to share between threads."""

    def __init__(self, reader: MegatronReader, writer: HFWriter, check_finite: bool) -> None:
        self._reader, self._writer, self._check_finite = reader, writer, check_finite

    def write(self, unit: Unit, progress: Progress) -> Record:
        """Write the tensors of a unit. Its record: their checksums, and numbers that are not finite."""
        hf, values = self._reader.hf, Values(self._check_finite)
        parts: list[str] = []
        memory = torch.empty(BLOCK_BYTES, dtype=torch.uint8)  # new memory costs a page fault for every 4 KiB
        for name in unit.names:
            for start, block in self._reader.blocks(name, memory):
                for part, row, rows in export_rows(hf, name, start, block):
                    self._writer.write(part, row, rows, values)
                progress(block.nbytes)
            parts += hf_parts(hf, name)
        self._reader.check_rest(unit.names)
        return {"digests": self._writer.digests(parts), "nonfinite": values.nonfinite}

    def holds(self, unit: Unit, record: Record) -> bool:
        """Whether the tensors of a unit are in their files, with the bytes that its record promises."""
        digests, parts = record["digests"], [part for name in unit.names for part in hf_parts(self._reader.hf, name)]
        if list(digests) != parts or not isinstance(record["nonfinite"], dict):
            return False
        return all(self._writer.stored_digest(part) == digests[part] for part in parts)


def convert(
    megatron_dir: str | Path,
    out: str | Path,
    *,
    hf_config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    threads: int = 1,
    overwrite: bool = False,
    resume: bool = False,
    card: Mapping[str, Any] | None = None,
    dialect: int | None = None,
    check_finite: bool = False,
    team: Team = ALONE,
    progress: Progress = lambda count: None,
) -> str:
    """Write `out` completely or not at all; returns a sentence about non-finite numbers.

    The bytes are compared with the source's manifest, if there is one, while they are read.

    Args:
        check_finite: NaN and infinite numbers are an error.
        hf_config: directory with config.json, for checkpoints without one.
        dialect: write config.json as transformers 4 or 5 does; None: as it was read.
        card: facts for the model card (`CARD_KEYS`); those in the checkpoint's manifest are the default.
        resume: continue an interrupted conversion of the same source, and leave what is written when interrupted.
        team: this process's place among several that share the work; rank 0 publishes.

    Raises:
        ValueError, OSError: what is wrong with the source or the destination, in one sentence.
    """
    reader = MegatronReader(megatron_dir, hf_config)
    refuse_foreign_links(reader.hf_dir)
    hf, sources = reader.hf, [reader.directory, reader.hf_dir]
    dtypes = {part: stored_dtype(n, dtype) or reader.dtype(n) for n in reader.names() for part in hf_parts(hf, n)}
    facts = {key: (reader.manifest or {}).get(key) for key in CARD_KEYS} | dict(card or {})
    units = cut({n: reader.dtype(n).itemsize * math.prod(megatron_shape(hf, n)) for n in reader.names()})
    before = listing(sources)
    this = job(before, dtype=dtype, check_finite=check_finite, max_shard_size=max_shard_size)

    def files(partial: Path, make: bool = False) -> HFWriter:
        return HFWriter(partial, hf_shapes(hf), dtypes, max_shard_size, make=make)

    def prepare(partial: Path) -> None:
        files(partial, make=True).close()

    with team.directory(out, prepare, overwrite=overwrite, sources=sources, job=this, resume=resume) as place:
        partial, alive = place
        with contextlib.closing(files(partial)) as writer:
            unit_writer = _UnitWriter(reader, writer, check_finite)
            work = Work(units, unit_writer.write, unit_writer.holds)
            kept = work.run(partial, team.rank, team.world, threads, lambda count: (progress(count), alive(count)))
        found = reader.check_rest(())
        if reader.manifest is None:
            require_unchanged(sources, before)
        if team.rank == 0:
            team.collect(partial)
            records = work.records(partial)
            found += f"; {nonfinite_report(records)}"
            digests = {part: digest for record in records for part, digest in record["digests"].items()}
            finish_directory(partial, hf, reader.hf_dir, dtypes, facts, digests, dialect)
    return found + kept_report(kept, len(units))


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

    config.json is copied byte for byte, unless its dtype differs from that of the weights, or a `dialect` is requested.
    """
    copy_side_files(hf_dir, out)
    config = dict(hf.raw)
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = str(main_dtype(hf_shapes(hf), dtypes)).removeprefix("torch.")
    config.pop(QUANTISATION, None)  # what is written here never is
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
    cli.add_backend(parser, bridge.BACKENDS)
    add_team(parser)
    add_export(parser)
    args = parser.parse_args()
    team = team_of(args)
    found = require(args.megatron, "Megatron", "conversion.hf_to_megatron")
    config = Path(args.hf_config) if args.hf_config else found / HF_FILES
    if (config / "config.json").is_file() and bridge.wanted(args.backend, config):
        given = {"--dtype": args.dtype, "--resume": args.resume, "--world": team.world > 1}
        given |= {"--check-finite": args.check_finite, "--config-dialect": args.config_dialect}
        bridge.refuse_options(given)
        print(bridge.export_checkpoint(args.megatron, args.out, args.hf_config, overwrite=args.overwrite))
        return 0
    reader = MegatronReader(args.megatron, args.hf_config)
    total = sum(reader.dtype(n).itemsize * math.prod(megatron_shape(reader.hf, n)) for n in reader.names())
    with cli.progress("Megatron -> Hugging Face", total // team.world) as advance:
        report = convert(
            args.megatron,
            args.out,
            **cli.common(args),
            hf_config=args.hf_config,
            max_shard_size=args.max_shard_size,
            team=team,
            card={key: value for key in CARD_KEYS if (value := getattr(args, key)) is not None},
            dialect=args.config_dialect,
            progress=advance,
        )
    print(report)
    return 0


if __name__ == "__main__":
    cli.run(main)
