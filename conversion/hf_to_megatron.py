"""Hugging Face directory -> Megatron checkpoint: `python -m conversion.hf_to_megatron --hf DIR --out DIR`.

The result is in Megatron's `dist_checkpointing` format and loads at any TP, PP, VPP and EP. No Megatron is needed here.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from conversion import cli
from conversion.adapter import Adapter, MergedReader
from conversion.config import HFConfig
from conversion.hf_files import copy_side_files
from conversion.locate import RELEASE, require
from conversion.mapping import HF_OUTPUT, hf_parts, hf_shapes, unconsumed
from conversion.megatron_args import beyond_gpt_model, megatron_lm_flags
from conversion.megatron_reader import HF_FILES
from conversion.megatron_writer import Progress, Reader, Written, finish_megatron, write_share
from conversion.parse import read_config
from conversion.pickled import open_hf
from conversion.publish import TRACKER, check_manifest, published, require_space, write_manifest
from conversion.together import ALONE, Team, add_team, team_of
from conversion.values import Values

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
    allow_pickle: bool = False,
    check_finite: bool = False,
    layout: str = "flat",
    adapter: str | Path | None = None,
    team: Team = ALONE,
    progress: Progress = lambda count: None,
) -> str:
    """Write `out` completely or not at all; a sentence on what was found in the numbers.

    What a manifest of the source promises is compared with the bytes as they are read.

    Args:
        allow_pickle: read `pytorch_model.bin` where there are no safetensors.
        check_finite: NaN and infinite numbers are an error.
        adapter: directory of a PEFT LoRA adapter to merge into the weights.
        team: this process's place among several that share the work; rank 0 publishes.
        layout: "flat", `out` is the checkpoint; "megatron-lm", `out` is what Megatron-LM takes as `--load`.

    Raises:
        ValueError, OSError: what is wrong with the source or the destination.
    """
    hf_dir, values = require(hf_dir, "Hugging Face", "conversion.megatron_to_hf"), Values(check_finite)
    check_manifest(hf_dir, contents=False)
    hf = read_config(hf_dir)
    reader: Reader = (base := open_hf(hf_dir, allow_pickle=allow_pickle))
    try:
        check_source(hf, base)
        if adapter is not None:
            lora = Adapter(adapter)
            lora.check(hf_shapes(hf))
            reader = MergedReader(base, lora)
        sources = [hf_dir, *([adapter] if adapter else [])]
        with published(out, overwrite, sources) if team.rank == 0 else nullcontext(None) as own:
            partial = own or team.join(out)
            checkpoint = partial if layout == "flat" else partial / RELEASE

            def write(progress: Progress) -> tuple[Written, str]:
                written = write_share(
                    hf,
                    reader,
                    checkpoint,
                    dtype=dtype,
                    threads=threads,
                    values=values,
                    progress=progress,
                    rank=team.rank,
                    world=team.world,
                )
                return written, reader.check_rest(part for name in written.names for part in hf_parts(hf, name))

            if own is None:
                with team.at_work(partial) as alive:
                    written, checked = write(lambda count: (progress(count), alive(count)))
                    team.report(partial, {**asdict(written), "nonfinite": values.nonfinite})
                return f"{checked}; {values.report()}"
            require_space(partial, total_bytes(hf, reader, dtype))
            checkpoint.mkdir(exist_ok=True)
            team.open(partial)
            written, checked = write(progress)
            reports = team.collect(partial)
            for report in reports:
                values.nonfinite.update(report["nonfinite"])
            shares = [written, *(Written.from_json(report) for report in reports)]
            segments = finish_megatron(hf, reader, checkpoint, dtype, shares)
            copy_side_files(hf_dir, checkpoint / HF_FILES)
            if layout != "flat":
                (partial / TRACKER).write_text(RELEASE, encoding="utf-8")
            write_manifest(checkpoint, segments=segments, base_model=_name(hf_dir, adapter))
    finally:
        reader.close()
    return f"{checked}; {values.report()}"


def _name(hf_dir: Path, adapter: str | Path | None) -> str:
    return hf_dir.resolve().name + (f" + {Path(adapter).resolve().name}" if adapter else "")


def total_bytes(hf: HFConfig, reader: Reader, dtype: torch.dtype | None) -> int:
    """Bytes of all tensors of the model in the dtype that they will have."""
    total = 0
    for name in hf_shapes(hf):
        where = reader.tensors[name]
        total += torch.Size(where.shape).numel() * (dtype or where.dtype).itemsize
    return total


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conversion.hf_to_megatron", description=(__doc__ or "").strip())
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face model directory (safetensors)")
    parser.add_argument("--out", required=True, metavar="DIR", help="Megatron checkpoint to write")
    parser.add_argument("--allow-pickle", action="store_true", help="read *.bin weights, with weights_only=True")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter of PEFT to merge into the weights")
    parser.add_argument("--layout", choices=LAYOUTS, default="flat", help="megatron-lm: with its tracker file")
    add_team(parser)
    cli.add_common(parser)
    args = parser.parse_args()
    dtype = cli.DTYPES.get(args.dtype)
    directory = require(args.hf, "Hugging Face", "conversion.megatron_to_hf")
    read_config(directory)  # the first thing to complain about
    reader = open_hf(directory, allow_pickle=args.allow_pickle)
    total = sum(torch.Size(where.shape).numel() * (dtype or where.dtype).itemsize for where in reader.tensors.values())
    reader.close()
    with cli.progress("Hugging Face -> Megatron", total) as advance:
        report = convert(
            args.hf,
            args.out,
            dtype=dtype,
            threads=args.threads,
            overwrite=args.overwrite,
            allow_pickle=args.allow_pickle,
            check_finite=args.check_finite,
            layout=args.layout,
            adapter=args.adapter,
            team=team_of(args),
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
