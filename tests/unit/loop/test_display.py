"""The progress line: 80 columns with the remaining time; each plain line once without a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from recipes.loop import display
from recipes.loop.display import Display, duration

VALUES = {"critic/rewards/mean": 0.5, "actor/entropy": 0.4, "perf/throughput": 123456.0, "timing_s/step": 61.0}


def test_the_line_fits_80_columns_with_the_time_left() -> None:
    shown = Display(interactive=True)
    shown.console = Console(file=io.StringIO(), force_terminal=True, width=80, legacy_windows=False, color_system=None)
    shown.start(0, 100000)
    shown.step(99, VALUES)
    shown.stop()
    lines = shown.console.file.getvalue().replace("\r", "\n").splitlines()  # type: ignore[attr-defined]
    line = next(line for line in reversed(lines) if "left" in line)
    text = line.split("\x1b")[0] if "\x1b[" in line[-8:] else line
    assert "99/100000" in text and "70 d 13 h left" in text and "reward 0.500" in text and "entropy 0.400" in text
    assert len(text.replace("\x1b[2K", "").strip()) <= 80


def test_plain_lines_come_once_and_never_with_escapes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich treats this as a terminal
    monkeypatch.setattr(display, "PLAIN_EVERY_S", 0.0)
    shown = Display()
    shown.start(0, 3)
    for step in (1, 2, 3, 3):
        shown.step(step, VALUES)
    shown.say("done")
    shown.stop()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3", "done"]
    assert "2 min left" in lines[0] and not any("\x1b" in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (100, "2 min"), (4800, "80 min"), (12000, "3 h 20 min"), (187200, "2 d 4 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
