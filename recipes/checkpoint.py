"""List a run's checkpoints, and export one as a Hugging Face directory, also while the run goes on.

`python -m recipes.checkpoint RUN_DIR` lists them; `--export DIR [--step N]` writes the policy of one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from configs.load import load_saved_config
from conversion import cli
from conversion.megatron_to_hf import add_export, convert
from conversion.publish import ManifestError, check_manifest
from recipes.checks.messages import sentence
from recipes.models.card import export_card


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Complete checkpoints of a run by step. Raises ValueError when there is none."""
    paths = sorted((run_dir / "checkpoints").glob("step_*"))
    found = {int(path.name[5:]): path for path in paths if path.name[5:].isdecimal()}
    if not found:
        raise ValueError(f"{run_dir}: no checkpoints there; give the directory of a run (run.dir)")
    return found


def show(found: dict[int, Path]) -> None:
    table = Table()
    for column in ("step", "MiB", "manifest"):
        table.add_column(column)
    for step, path in found.items():
        try:
            manifest = check_manifest(path, contents=True)
            verdict = "verified" if manifest else "missing"
        except ManifestError as error:
            verdict = str(error)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        table.add_row(str(step), f"{size / 2**20:.1f}", verdict)
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.checkpoint", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--step", type=int, help="default: the newest")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the policy there in Hugging Face format")
    add_export(parser)
    args = parser.parse_args(argv)
    try:
        found = checkpoints(args.run_dir)
        if args.export is None:
            show(found)
            return 0
        step = max(found) if args.step is None else args.step
        if step not in found:
            raise ValueError(f"--step {step}: there are checkpoints of steps {', '.join(map(str, found))}")
        saved = args.run_dir / "config.yaml"
        card = export_card(load_saved_config(saved), step, args.run_dir) if saved.is_file() else {"step": step}
        report = convert(
            found[step],
            args.export,
            **cli.common(args),
            max_shard_size=args.max_shard_size,
            dialect=args.config_dialect,
            card=card,
        )
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    print(f"wrote {args.export} (step {step}): {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
