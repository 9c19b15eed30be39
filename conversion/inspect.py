"""Print the contents of a checkpoint without loading it: `python -m conversion.inspect DIR [--tensors]`."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conversion import cli
from conversion.config import HFConfig
from conversion.hf_files import HFReader
from conversion.locate import locate
from conversion.mapping import hf_shapes
from conversion.megatron_reader import HF_FILES, read_metadata
from conversion.parse import read_config
from conversion.publish import MANIFEST, read_manifest

Listing = list[tuple[str, tuple[int, ...], str, int]]  # name, shape, dtype, stored pieces


def list_megatron(directory: Path) -> Listing:
    """Every tensor of a Megatron checkpoint, optimizer state included."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    return [
        (key, tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."), len(entry.chunks))
        for key, entry in sorted(read_metadata(directory).state_dict_metadata.items())
        if isinstance(entry, TensorStorageMetadata)
    ]


def list_hf(directory: Path) -> Listing:
    """Every tensor of a Hugging Face directory."""
    reader = HFReader(directory)
    found = [(n, t.shape, str(t.dtype).removeprefix("torch."), 1) for n, t in sorted(reader.tensors.items())]
    reader.close()
    return found


def facts(directory: Path, hf: HFConfig | None, listing: Listing) -> dict[str, str]:
    """The summary, by label."""
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    dtypes = Counter(dtype for _, _, dtype, _ in listing)
    rows = {
        "tensors": f"{len(listing)} ({', '.join(f'{count} {dtype}' for dtype, count in dtypes.most_common())})",
        "numbers stored": f"{sum(math.prod(shape) for _, shape, _, _ in listing):,}",
        "size on disk": f"{size / 2**20:,.1f} MiB",
    }
    if hf is not None:
        rows |= {
            "architecture": hf.architecture,
            "parameters": f"{sum(math.prod(shape) for shape in hf_shapes(hf).values()):,}",
            "layers x hidden": f"{hf.num_layers} x {hf.hidden_size}",
            "heads / KV heads / head size": f"{hf.num_heads} / {hf.num_kv_heads} / {hf.head_dim}",
            "vocabulary": f"{hf.vocab_size}{' (tied)' if hf.tied else ''}",
            "RoPE": f"theta {hf.rope.theta:g}, {hf.rope.kind}, {hf.max_positions} positions",
        }
        if hf.experts:
            rows["experts"] = f"{hf.experts.count}, {hf.experts.top_k} per token"
    manifest = read_manifest(directory) or {}
    skip = ("format", "files", "tensors")
    rows["manifest"] = f"{len(manifest['files'])} files" if manifest else f"none ({MANIFEST} is missing)"
    return rows | {key: str(value) for key, value in manifest.items() if key not in skip}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conversion.inspect", description=(__doc__ or "").strip())
    parser.add_argument("directory", type=Path, help="Hugging Face or Megatron directory")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    args = parser.parse_args()
    kind, directory = locate(args.directory)
    megatron = kind == "Megatron"
    config_dir = directory / HF_FILES if megatron else directory
    hf = read_config(config_dir) if not megatron or (config_dir / "config.json").is_file() else None
    listing = list_megatron(directory) if megatron else list_hf(directory)
    console = Console()
    table = Table(title=f"{kind} checkpoint", show_header=False)
    for label, value in facts(directory, hf, listing).items():
        table.add_row(label, value)
    console.print(table)
    if args.tensors:
        for name, shape, dtype, pieces in listing:
            print(f"{name}  {list(shape)}  {dtype}" + (f"  in {pieces} pieces" if pieces > 1 else ""))
    return 0


if __name__ == "__main__":
    cli.run(main)
