"""The first hour on a GPU, without one: parts that succeed, fail, take too long or lack a package.

`python -m pytest -m slow tests/integration/test_gpu_day.py` runs every real part with tiny sizes (4 minutes).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.gpu_day import PARTS, Part, day, main

SLEEP = ("timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)")
PRINT = ("timeit", "-n", "1", "-r", "1", "print('{{\"tokens_per_s\": 3}}')")


def _part(name: str, words: tuple[str, ...], minutes: float = 1.0, needs: str = "") -> Part:
    return Part(name, f"about {name}", words, minutes, words, needs)


def test_what_was_measured_is_kept_whatever_happens_to_the_rest(tmp_path: Path) -> None:
    parts = [
        _part("fails", ("timeit", "-n", "1", "-r", "1", "print('why'); raise ValueError")),
        _part("sleeps", SLEEP, minutes=0.02),
        _part("lacks", PRINT, needs="a_package_that_is_not_there"),
        _part("works", PRINT),
    ]
    summary = day(parts, tmp_path, 5.0, tiny=True)
    assert [part["state"].split(":")[0] for part in summary["parts"]] == [
        "failed with status 1",
        "too slow",
        "skipped",
        "done",
    ]
    assert summary["parts"][3]["results"] == [{"tokens_per_s": 3}]
    assert json.loads((tmp_path / "day.json").read_text()) == summary
    assert {"card", "date", "versions", "commit"} <= summary.keys() and summary["versions"]["torch"]
    kept = json.loads((tmp_path / "fails.json").read_text())
    assert "why" in kept["output"] and kept["command"].startswith("python -m timeit")


def test_nothing_starts_when_the_time_is_up(tmp_path: Path) -> None:
    summary = day([_part("late", SLEEP)], tmp_path, 0.0, tiny=True)
    assert summary["parts"] == [{"part": "late", "state": "skipped: no time left"}]


def test_every_part_is_a_program_that_exists() -> None:
    for part in PARTS:
        for words in (part.words, part.tiny):
            assert importlib.util.find_spec(words[0]) is not None, words[0]
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert sum(part.minutes for part in PARTS) <= 33, "most of it fits 25 minutes: parts rarely need their limit"


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--minutes", "20"]) == 0
