"""Check every theorem of the papers by taking the step: `python -m recipes.theory [--out FILE]`, `make theory`.

Prints a line per check and writes one self-contained page. Exit status 1 if a check contradicts what is expected.
`python -m recipes.theory --losses` prints instead what a step of every loss and selection does to the entropy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.studies import figures, pages, slopes
from recipes.studies.checks import CHECKS
from recipes.studies.checks.kinds import ETA, POLICIES, Check, Outcome


def _charts(found: list[tuple[Check, Outcome]]) -> list[tuple[str, str]]:
    result, axes = figures.figure(9.6, 3.6, 1, 2)
    errors, scatter = axes[0]
    for check, outcome in found:
        if not outcome.errors:
            continue
        wrong = check.expected == "fails"
        x, y = zip(*outcome.errors, strict=True)
        errors.loglog(x, y, color="#d1571b" if wrong else "#555555", linestyle="--" if wrong else "-", linewidth=1)
        if not wrong:
            scatter.plot(*zip(*outcome.pairs, strict=True), ".", color="#555555", markersize=3)
    errors.axhline(0.1, color="black", linewidth=0.8, linestyle=":")
    errors.set(xlabel="step size", ylabel="relative error of the prediction", title="Error over step size")
    low, high = scatter.get_xlim()
    scatter.plot([low, high], [low, high], color="black", linewidth=0.8)
    scatter.set(xlabel="predicted change of entropy, nats", ylabel="measured", title=f"At step size {ETA:g}")
    caption = (
        "Left: solid, claims that hold, whose error vanishes with the step; dashed, claims known to be wrong, whose "
        f"error does not; dotted, 10 %. Right: every claim that holds, {POLICIES} random policies each."
    )
    return [(caption, figures.inline(result, "theory"))]


def _tables(found: list[tuple[Check, Outcome]]) -> list[pages.Table]:
    head = ["", "claim", "verdict", "expected", "measured", "order", "10 % error at step"]
    tables: dict[str, pages.Table] = {}
    for check, o in found:
        table = tables.setdefault(check.paper, pages.Table(check.paper, head, numbers=False))
        cells = [check.label, check.statement, o.verdict, check.expected, o.measured]
        cells += ["" if o.order is None else f"{o.order:.2f}", "" if o.breaks_at is None else f"{o.breaks_at:.2g}"]
        table.rows.append(pages.Row(cells, mark=o.verdict != check.expected))
    return list(tables.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.theory", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/theory.html"),
        help="page with every check, its formula and its figures; default: %(default)s",
    )
    parser.add_argument("--losses", action="store_true", help="print the change of entropy per loss and selection")
    args = parser.parse_args(argv)
    if args.losses:
        print(slopes.table())
        return 0
    found = []
    for check in CHECKS:
        outcome = check.run()
        found.append((check, outcome))
        mark = " " if outcome.verdict == check.expected else "!"
        print(f"{mark} {check.paper.split(',')[0]:<26}{check.label:<38}{outcome.verdict:<22}{outcome.measured}")
    surprises = sum(o.verdict != c.expected for c, o in found)
    lead = [
        f"{len(found)} theorems, corollaries and rules of thumb, each checked by taking the step on random tabular "
        f"policies in float64; {surprises} contradict what is expected.",
        "Order: halving the step divides the error by 2 to this power; 2 if a first-order claim is right, 1 if its "
        "slope is wrong. The last column is the step at which the prediction is off by 10 % (median).",
    ]
    path = pages.write(args.out, "The papers' theorems, checked by taking steps", lead, _charts(found), _tables(found))
    print(f"{len(found)} checks, {surprises} not as expected: {path}")
    return int(surprises > 0)


if __name__ == "__main__":
    sys.exit(main())
