"""Common parts of the command lines: options, progress, and errors as one sentence."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """Bytes from "5GB", "500MiB" or a plain number; ArgumentTypeError otherwise."""
    digits = text.rstrip("KMGIBkmgib")
    unit = text[len(digits) :].upper()
    try:
        value = float(digits) * (_UNITS[unit] if unit else 1)
    except (ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MiB") from error
    return int(value)


def positive(text: str) -> int:
    """A whole number of at least 1; ArgumentTypeError otherwise."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="cast all tensors (default: keep)")
    parser.add_argument("--threads", type=positive, default=default_threads(), help="default: %(default)s")
    parser.add_argument("--check-finite", action="store_true", help="refuse NaN and infinite numbers")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted conversion of the same source; keep what is written when interrupted",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace --out if it is a checkpoint made by this project, and holds nothing else",
    )


def add_backend(parser: argparse.ArgumentParser, choices: Sequence[str]) -> None:
    parser.add_argument(
        "--backend",
        choices=choices,
        default="auto",
        help="auto (default): Megatron-Bridge, where it is installed, for an architecture that has no table here",
    )


def common(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_common` read, as arguments of both `convert` functions."""
    given = {key: getattr(args, key) for key in ("threads", "overwrite", "resume", "check_finite")}
    return {"dtype": DTYPES.get(args.dtype), **given}


def default_threads() -> int:
    """One per usable core, at most 8, because more only wait for the disk."""
    return min(len(os.sched_getaffinity(0)), 8)


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes/s and time left on a terminal, one line at the end elsewhere; give it bytes as they are done."""
    started, done, lock = time.monotonic(), 0, threading.Lock()
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=total)

        def advance(count: int) -> None:
            nonlocal done
            with lock:
                done += count
            bar.advance(task, count)

        yield advance
    seconds = time.monotonic() - started
    print(f"{title}: {done / 2**20:,.1f} MiB in {seconds:.1f} s ({done / 2**20 / seconds:,.0f} MiB/s)", file=sys.stderr)


class _Terminated(BaseException):
    """SIGTERM or SIGHUP arrived."""


def _terminate(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
    raise _Terminated(number)


def _left() -> str:
    return "the same command continues" if "--resume" in sys.argv else "nothing was left behind"


def run(main: Callable[[], int]) -> None:
    """Run a command; errors that a user can fix end in one sentence and status 1 instead of a traceback.

    SIGTERM and SIGHUP end it like an interrupt: temporary files are removed, unless `--resume` keeps them. The status
    is then 128 + the signal.
    """
    torch.set_num_threads(1)  # conversion has threads of its own
    handlers = {number: signal.signal(number, _terminate) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        status = main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print(f"interrupted: {_left()}", file=sys.stderr)
        status = 130
    except _Terminated as signalled:
        print(f"terminated: {_left()}", file=sys.stderr)
        status = 128 + int(signalled.args[0])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise SystemExit(status)
