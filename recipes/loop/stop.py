"""How a user or a scheduler asks a run to end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path


class StopSignal:
    """Ctrl-C, SIGTERM, SIGUSR1 or the existence of ``file`` requests a checkpoint after this step and a clean end.

    A second Ctrl-C ends the run immediately.
    """

    def __init__(self, file: Path, say: Callable[[str], None]) -> None:
        self._file, self._signalled, self._say = file, False, say
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._set)

    @property
    def requested(self) -> bool:
        return self._signalled or self._file.exists()

    def _set(self, number: int, *_: object) -> None:
        self._signalled = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._say("stopping after this step with a checkpoint; Ctrl-C again leaves at once")
