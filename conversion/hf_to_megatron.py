"""Hugging Face directory -> Megatron checkpoint: `python -m conversion.hf_to_megatron --hf DIR --out DIR`.

The result is in Megatron's `dist_checkpointing` format and loads at any TP, PP, VPP and EP. No Megatron is needed here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from conversion import bridge, cli
from conversion.adapter import Adapter, MergedReader
from conversion.config import HFConfig
from conversion.hf_files import copy_side_files, refuse_foreign_links
from conversion.locate import RELEASE, require
from conversion.mapping import HF_OUTPUT, hf_shapes, left_out, unconsumed
from conversion.megatron_args import beyond_gpt_model, megatron_lm_flags
from conversion.megatron_reader import HF_FILES
from conversion.megatron_writer import Plan, Progress, Reader, UnitWriter, finish_megatron
from conversion.parse import read_config
from conversion.pickled import open_hf
from conversion.publish import TRACKER, check_manifest, require_space, write_manifest
from conversion.quantised import describe_unquantised
from conversion.together import ALONE, Team, add_team, team_of
from conversion.units import Record, Work, job, kept_report, listing, require_unchanged
from conversion.values import nonfinite_report

LAYOUTS = ("flat", "megatron-lm")


def check_source(hf: HFConfig, reader: Reader) -> None:
    """ValueError when the tensors are not exactly those that config.json implies; says which, and how they differ."""
    where = reader.directory
    shapes = hf_shapes(hf)
    if missing := sorted(set(shapes) - set(reader.tensors)):
        raise ValueError(f"{where} lacks the tensors {', '.join(missing[:8])}, which its config.json implies")
    if extra := unconsumed(hf, reader.tensors):
        raise ValueError(f"{where} has tensors that nothing in {hf.architecture} uses: {', '.join(extra[:8])}")
    for name, shape in shapes.items():
        if (found := tuple(reader.tensors[name].shape)) != shape:
            raise ValueError(f"tensor {name!r} in {where} has shape {found} but config.json implies {shape}")
    if hf.tied and HF_OUTPUT in reader.tensors:
        embedding = "model.embed_tokens.weight"
        for start in range(0, hf.vocab_size, 4096):
            stop = min(start + 4096, hf.vocab_size)
            if not torch.equal(reader.rows(HF_OUTPUT, start, stop), reader.rows(embedding, start, stop)):
                raise ValueError(
                    f"config.json says tie_word_embeddings=true but {HF_OUTPUT} differs from {embedding}: "
                    "set it to false or remove the tensor"
                )


def convert(
    hf_dir: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    threads: int = 1,
    overwrite: bool = False,
    resume: bool = False,
    allow_pickle: bool = False,
    check_finite: bool = False,
    layout: str = "flat",
    adapter: str | Path | None = None,
    team: Team = ALONE,
    progress: Progress = lambda count: None,
) -> str:
    """Write `out` completely or not at all; returns a sentence about non-finite numbers.

    The bytes are compared with the source's manifest, if there is one, while they are read.

    Args:
        resume: continue an interrupted conversion of the same source, and leave what is written when interrupted.
        allow_pickle: read `pytorch_model.bin` where there are no safetensors.
        check_finite: NaN and infinite numbers are an error.
        adapter: directory of a PEFT LoRA adapter to merge into the weights.
        team: this process's place among several that share the work; rank 0 publishes.
        layout: "flat": `out` is the checkpoint; "megatron-lm": `out` is a directory for Megatron-LM's `--load`.

    Raises:
        ValueError, OSError: what is wrong with the source or the destination.
    """
    hf_dir = require(hf_dir, "Hugging Face", "conversion.megatron_to_hf")
    refuse_foreign_links(hf_dir)
    manifest = check_manifest(hf_dir, contents=False)
    hf, sources = read_config(hf_dir), [hf_dir, *([adapter] if adapter else [])]
    reader = _open(hf, hf_dir, adapter, allow_pickle)
    try:
        plan = Plan(hf, reader, dtype)
        files = listing(sources)
        this = job(files, dtype=dtype, check_finite=check_finite, layout=layout)

        def prepare(partial: Path) -> None:
            require_space(partial, plan.total_bytes)
            _checkpoint(partial, layout).mkdir(exist_ok=True)

        with team.directory(out, prepare, overwrite=overwrite, sources=sources, job=this, resume=resume) as place:
            partial, alive = place
            writer = UnitWriter(hf, reader, _checkpoint(partial, layout), plan, check_finite)
            work = Work(plan.units, writer.write, writer.holds)
            kept = work.run(partial, team.rank, team.world, threads, lambda count: (progress(count), alive(count)))
            found = reader.check_rest(())
            if manifest is None:
                require_unchanged(sources, files)
            if team.rank == 0:
                team.collect(partial)
                records = work.records(partial)
                found += f"; {nonfinite_report(records)}"
                _finish(hf, hf_dir, partial, plan, records, layout, _name(hf_dir, adapter))
    finally:
        reader.close()
    beyond = left_out(hf, reader.tensors)
    return found + kept_report(kept, len(work.units)) + (f"; left out: {beyond[0]} and its layer" if beyond else "")


def _checkpoint(partial: Path, layout: str) -> Path:
    return partial if layout == "flat" else partial / RELEASE


def _open(hf: HFConfig, hf_dir: Path, adapter: str | Path | None, allow_pickle: bool) -> Reader:
    """The weights, checked against the config, with an adapter merged in."""
    base = open_hf(hf_dir, allow_pickle=allow_pickle)
    try:
        check_source(hf, base)
        if adapter is None:
            return base
        lora = Adapter(adapter)
        lora.check(hf_shapes(hf))
        return MergedReader(base, lora)
    except BaseException:
        base.close()
        raise


def _finish(
    hf: HFConfig, hf_dir: Path, partial: Path, plan: Plan, records: list[Record], layout: str, base_model: str
) -> None:
    """Everything but the weights: index, configuration and tokenizer, Megatron-LM's tracker file, manifest."""
    checkpoint = _checkpoint(partial, layout)
    segments = finish_megatron(hf, checkpoint, plan, records)
    copy_side_files(hf_dir, checkpoint / HF_FILES)
    describe_unquantised(checkpoint / HF_FILES / "config.json")
    if layout != "flat":
        (partial / TRACKER).write_text(RELEASE, encoding="utf-8")
    write_manifest(checkpoint, segments=segments, base_model=base_model)


def _name(hf_dir: Path, adapter: str | Path | None) -> str:
    return hf_dir.resolve().name + (f" + {Path(adapter).resolve().name}" if adapter else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conversion.hf_to_megatron", description=(__doc__ or "").strip())
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face model directory (safetensors)")
    parser.add_argument("--out", required=True, metavar="DIR", help="Megatron checkpoint to write")
    parser.add_argument("--allow-pickle", action="store_true", help="read *.bin weights, with weights_only=True")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter of PEFT to merge into the weights")
    parser.add_argument("--layout", choices=LAYOUTS, default="flat", help="megatron-lm: with its tracker file")
    cli.add_backend(parser, bridge.BACKENDS)
    add_team(parser)
    cli.add_common(parser)
    args = parser.parse_args()
    dtype = cli.DTYPES.get(args.dtype)
    directory = require(args.hf, "Hugging Face", "conversion.megatron_to_hf")
    if bridge.wanted(args.backend, directory):
        given = {"--adapter": args.adapter, "--resume": args.resume, "--world": (args.world or 1) > 1}
        given |= {"--check-finite": args.check_finite, "--allow-pickle": args.allow_pickle}
        bridge.refuse_options(given)
        print(bridge.import_checkpoint(directory, args.out, dtype=dtype, overwrite=args.overwrite))
        return 0
    read_config(directory)  # the first thing to complain about
    reader = open_hf(directory, allow_pickle=args.allow_pickle)
    total = sum(torch.Size(where.shape).numel() * (dtype or where.dtype).itemsize for where in reader.tensors.values())
    team = team_of(args)
    reader.close()
    with cli.progress("Hugging Face -> Megatron", total // team.world) as advance:
        report = convert(
            args.hf,
            args.out,
            **cli.common(args),
            allow_pickle=args.allow_pickle,
            layout=args.layout,
            adapter=args.adapter,
            team=team,
            progress=advance,
        )
    print(report)
    if args.layout == "megatron-lm":
        hf = read_config(directory)
        print(f"Megatron-LM: --load {args.out} {' '.join(megatron_lm_flags(hf))}")
        if lacks := beyond_gpt_model(hf):
            print(f"Megatron-LM's own GPTModel lacks {', '.join(lacks)}: it needs a layer spec that adds them")
    return 0


if __name__ == "__main__":
    cli.run(main)
