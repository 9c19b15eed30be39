"""Progress display of a run: one line of at most 80 columns, or plain lines if the output is no terminal."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

PLAIN_EVERY_S = 5.0  # seconds between progress lines when the output is not a terminal
RECENT = 10  # the median time of these last steps gives the estimate of the time left


class Display:
    """Progress and messages. ``interactive`` None: interactive if the output is a terminal that can move its cursor."""

    def __init__(self, *, interactive: bool | None = None) -> None:
        if interactive is None:  # rich treats FORCE_COLOR as a terminal, which would fill a log with repeated lines
            interactive = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.console = Console(highlight=False, soft_wrap=True, force_terminal=interactive)
        self._interactive = interactive
        self._progress: Progress | None = None
        self._printed = 0.0
        self._shown = -1
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._total = 0

    def start(self, step: int, total: int) -> None:
        self._total = total
        if self._interactive:
            one_line = Column(no_wrap=True, overflow="ellipsis")
            self._progress = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=10),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[status]}", table_column=one_line),
                console=self.console,
            )
            self._progress.add_task("train", total=total, completed=step, left="", status="starting")
            self._progress.start()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """The state after a step, from its line of ``metrics.jsonl``."""
        self._seconds.append(values["timing_s/step"])
        left = f"{duration((self._total - step) * statistics.median(self._seconds))} left"
        status = f"reward {values['critic/rewards/mean']:.3f}  entropy {values.get('actor/entropy', float('nan')):.3f}"
        speed = f"{values['perf/throughput']:.0f} tok/s"
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, left=left, status=f"{status}  {speed}")
        elif step != self._shown and (time.monotonic() - self._printed > PLAIN_EVERY_S or step == self._total):
            self._printed, self._shown = time.monotonic(), step
            seconds = f"{values['timing_s/step']:.2f} s/step"
            print(f"step {step}/{self._total}  {left}  {status}  {speed}  {seconds}", flush=True)


def duration(seconds: float) -> str:
    """Short words for a time: ``45 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
