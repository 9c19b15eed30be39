"""One page that says how a run went: `python -m recipes.report RUN_DIR [RUN_DIR ...]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes.reporting.page import write_report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.report", description="Write the HTML report of a run.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="several are overlaid")
    parser.add_argument("--out", type=Path, help="default: RUN_DIR/report.html, or comparison.html for several runs")
    args = parser.parse_args(argv)
    try:
        print(write_report(*args.run_dirs, out=args.out))
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
