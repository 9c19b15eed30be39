"""Compare methods over seeds: `python -m recipes.study NAME [--level L1] [--seeds N]`, or `make study STUDY=NAME`.

Completes ``benchmarks/results/studies/NAME.jsonl`` (a line per run; start it again and it resumes) and writes the
study's page to ``runs/studies/NAME.html``. Without a name: the list of studies. ``evidence``: regenerate the tables and
figures of docs/evidence.md from the results files.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.rl.params import suggest
from recipes.studies import evidence, full_stack, results, runner
from recipes.studies.definitions import STUDIES
from recipes.studies.full_stack import FULL_STUDIES
from recipes.studies.report import study_page

PAGES = Path("runs/studies")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.study", description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", metavar="NAME", help=", ".join([*STUDIES, *FULL_STUDIES]))
    parser.add_argument("--level", choices=["L1", "L2"], help="only this level")
    parser.add_argument("--setting", help="only the setting of this name")
    parser.add_argument("--method", action="append", metavar="NAME", help="only this method; may be given again")
    parser.add_argument("--seeds", type=int, help="default: the study's own number")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--minutes", type=float, help="full-stack studies: start no run after so many minutes")
    parser.add_argument("--rehearse", action="store_true", help="full-stack studies: every method once, tiny, on a CPU")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="directory of the results files")
    args = parser.parse_args(argv)
    if not args.name:
        for name in (*STUDIES, *FULL_STUDIES):
            described = STUDIES[name] if name in STUDIES else FULL_STUDIES[name]
            print(f"{name:<16}{described.title}. {described.question}")
    elif args.name in STUDIES:
        study = STUDIES[args.name]
        for known, wanted in ((study.settings, [args.setting]), (study.methods, args.method or [])):
            if unknown := [name for name in wanted if name and name not in known]:
                raise SystemExit(f"study {args.name!r} has no {unknown[0]!r}{suggest(unknown[0], known)}")
        runner.run(
            args.name,
            study,
            root=args.results,
            jobs=args.jobs,
            seeds=args.seeds,
            level=args.level,
            only=args.setting,
            methods=args.method,
        )
        _page(args.name, study.title, study.question, args.results)
    elif args.name in FULL_STUDIES:
        whole, root, runs = FULL_STUDIES[args.name], args.results, PAGES
        if args.rehearse:
            whole, root, runs = full_stack.rehearsal(whole), runs / "rehearsal", runs / "rehearsal"
        full_stack.run(args.name, whole, root=root, runs=runs, seeds=args.seeds, minutes=args.minutes)
        _page(args.name, whole.title, whole.question, root, runs)
    elif args.name == "evidence":
        print(*evidence.write(root=args.results), sep="\n")
    else:
        raise SystemExit(f"study {args.name!r} is unknown{suggest(args.name, [*STUDIES, *FULL_STUDIES])}")


def _page(name: str, title: str, question: str, root: Path, pages: Path = PAGES) -> None:
    print(study_page(name, title, question, pages / f"{name}.html", root))


if __name__ == "__main__":
    main()
