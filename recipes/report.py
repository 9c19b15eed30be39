"""Write the HTML report of one or several runs: `python -m recipes.report RUN_DIR [RUN_DIR ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recipes.checks.messages import sentence
from recipes.reporting.page import write_report
from recipes.reporting.serve import serve


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.report", description="Write the HTML report of a run.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="several are overlaid")
    parser.add_argument("--out", type=Path, help="default: RUN_DIR/report.html, or comparison.html for several runs")
    parser.add_argument("--serve", action="store_true", help="show it live on this machine's loopback address instead")
    parser.add_argument("--port", type=int, default=0, help="of --serve; default: a free one")
    args = parser.parse_args(argv)
    try:
        if args.serve:
            serve(args.run_dirs, args.port)
            return 0
        print(write_report(*args.run_dirs, out=args.out))
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
