"""Print a rollout journal: `python -m recipes.journal show RUN_DIR [--step N [--tokenizer DIR]] [--json]`.

Without ``--step``: one line per record. With it: the responses of that step, as token ids, or as text with a tokenizer.
``--json`` prints one object per line instead, floats exact.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.loop import journal


def show(run_dir: Path, step: int | None, decode: Callable[[list[int]], str], *, as_json: bool) -> None:
    """Print records of step number ``step`` (from 1), or all."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table("record", "step", "groups", "responses", "tokens", "versions", "mean reward")
    for record in journal.records(run_dir):
        about = record.about
        if step is not None and (about["step"] != step - 1 or about["kind"] != "rollouts"):
            continue
        if as_json:
            groups = {"groups": journal.as_groups(record)} if about["kind"] == "rollouts" else {}
            print(json.dumps({key: value for key, value in about.items() if key not in ("problems", "golds")} | groups))
        elif step is not None:
            for group in journal.as_groups(record):
                console.print(f"[bold]{escape(group['problem'])}[/]  answer {escape(group['gold'])}")
                console.print(f"  {escape(decode(group['prompt']))}")
                for r in group["responses"]:
                    console.print(
                        f"  [dim]reward {r['reward']:g}, {r['finish']}, logp {sum(r['logprobs']):.2f}[/]  "
                        f"{escape(decode(r['ids']))}"
                    )
        elif about["kind"] == "rollouts":
            arrays = record.arrays
            versions = sorted(set(arrays["versions"].tolist()))
            counts = (len(about["problems"]), len(arrays["reward"]), len(arrays["response_ids"]))
            mean = f"{float(arrays['reward'].mean()):.3f}" if len(arrays["reward"]) else ""
            table.add_row("rollouts", str(about["step"] + 1), *map(str, counts), ", ".join(map(str, versions)), mean)
        else:
            table.add_row("evaluation", f"after {about['step']}", "", "", "", "", "")
    if table.row_count:
        console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.journal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["show"])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--step", type=int, help="rollout step, from 1")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face directory: show text instead of token ids")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args(argv)
    decode: Callable[[list[int]], str] = lambda ids: " ".join(map(str, ids))  # noqa: E731
    try:
        if args.tokenizer is not None:
            from transformers import AutoTokenizer

            decode = AutoTokenizer.from_pretrained(args.tokenizer).decode
        show(args.run_dir, args.step, decode, as_json=args.json)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
