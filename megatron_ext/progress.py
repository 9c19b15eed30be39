"""What this rank is doing, written where another process can read it at any moment, whatever the interpreter does.

The main thread notes each phase of a step and each operation in it (`at`, `beat`); the record lives in shared memory.
`recipes.cluster.heartbeat` reads it from a process of its own, so that a rank which is stopped, deadlocked, or inside a
long call that holds the interpreter lock is still described, with the phase it is in and since when. Nothing here
needs torch or a lock; a note costs a few microseconds. Without `open_record` notes go nowhere.
"""

from __future__ import annotations

import json
import mmap
import os
import time

SIZE = 512  # bytes of the record: JSON, padded with spaces
_memory: mmap.mmap | None = None
_phase, _operation, _step = "start", "", 0
_phases = _done = 0  # entered; operations done in all of them
_before: set[str] = set()  # phases that have been left


def open_record() -> int:
    """Make the shared memory; its file descriptor, for the process that reads it."""
    global _memory
    descriptor = os.memfd_create("progress")
    os.ftruncate(descriptor, SIZE)
    _memory = mmap.mmap(descriptor, SIZE)
    _write()
    return descriptor


def at(phase: str, operation: str = "", *, step: int | None = None) -> None:
    """A new phase begins: "start", "load", "rollout", "sync", "statistics", "update", "save", ..."""
    global _phase, _operation, _step, _phases, _done
    _before.add(_phase)
    _phase, _operation, _phases, _done = phase, operation, _phases + 1, _done + 1
    if step is not None:
        _step = step
    _write()


def beat(operation: str = "", *, phase: str | None = None) -> None:
    """Something was done in this phase. From other threads give their ``phase``: it counts only in that one."""
    global _operation, _done
    if phase is None or phase == _phase:
        _operation, _done = operation or _operation, _done + 1
        _write()


def _write() -> None:
    if _memory is not None:
        record: dict[str, object] = {"phase": _phase, "operation": _operation[:100], "step": _step}
        record |= {"phases": _phases, "done": _done, "first": _phase not in _before}
        record["since"] = round(time.monotonic(), 3)  # one clock for all processes of a node
        _memory[:SIZE] = json.dumps(record).encode()[:SIZE].ljust(SIZE)
