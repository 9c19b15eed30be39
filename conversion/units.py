"""Units of a conversion, which threads and processes share and a later attempt can keep.

A unit is a contiguous part of the model. The division depends only on the model, so any number of processes, threads
and attempts writes the same bytes. When a unit is written, a small record with the checksums of its bytes is created
atomically, by a rename. An attempt that finds a record compares the checksums with the bytes on disk, and keeps the
unit only if they match. A unit without a record, such as a partly written file, is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.parallel import for_each, share

RECORDS = ".units"  # directory of the records inside the private one, gone before it is published
LARGEST, SMALLEST, ABOUT = 1 << 30, 64 << 20, 32  # bytes of a unit at most and at least, and how many there should be
_LAYOUT = 1  # of units and files: raise it when either changes, so that older leftovers are not continued

Record = dict[str, Any]  # as JSON can carry it


@dataclass(frozen=True, slots=True)
class Unit:
    """Some Megatron parameters, in the order of a forward pass."""

    number: int
    names: tuple[str, ...]
    size: int  # bytes


def cut(sizes: dict[str, int]) -> list[Unit]:
    """Units of neighbouring parameters, whose bytes are given by name; each parameter whole."""
    target = min(max(sum(sizes.values()) // ABOUT, SMALLEST), LARGEST)
    units: list[Unit] = []
    names: list[str] = []
    size = 0
    for name, count in sizes.items():
        if names and size + count > target:
            units.append(Unit(len(units), tuple(names), size))
            names, size = [], 0
        names.append(name)
        size += count
    return [*units, Unit(len(units), tuple(names), size)]


def listing(sources: Iterable[str | Path]) -> list[list[Any]]:
    """Name, size and time of change of all files: a digest of their bytes would take as long as a conversion."""
    files: list[list[Any]] = []
    for source in map(Path, sources):
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            status = path.stat()
            files.append([path.relative_to(source).as_posix(), status.st_size, status.st_mtime_ns])
    return files


def job(files: Sequence[Any], **options: Any) -> str:
    """Identity of a conversion of some `listing`: an interrupted conversion is continued only by the same one."""
    facts = {"layout": _LAYOUT, "files": files, "options": {key: str(value) for key, value in options.items()}}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def require_unchanged(sources: Iterable[str | Path], before: list[list[Any]]) -> None:
    """ValueError if a file of the sources is not as in an earlier `listing`: its bytes may be old and new ones."""
    after = listing(sources)
    if changed := [file[0] for file in after + before if file not in after or file not in before]:
        raise ValueError(f"{changed[0]} changed while the source was read: convert again when nothing writes to it")


class Stopped(Exception):
    """Another thread has failed, so this one stops."""


@dataclass
class Work:
    """Writes units, and compares them on disk with their records.

    Args:
        write: writes a unit and calls its second argument with numbers of bytes that are done; returns the record.
        holds: whether everything that a record tells of a unit is on disk.
    """

    units: Sequence[Unit]
    write: Callable[[Unit, Callable[[int], object]], Record]
    holds: Callable[[Unit, Record], bool]

    def run(self, partial: Path, rank: int, world: int, threads: int, progress: Callable[[int], object]) -> int:
        """Do one rank's share; how many units were kept from an earlier attempt. Errors are those of `write`."""
        directory, stop, kept = partial / RECORDS, threading.Event(), []
        directory.mkdir(exist_ok=True)

        def advance(count: int) -> None:
            if stop.is_set():
                raise Stopped
            progress(count)

        def do(unit: Unit) -> None:
            path = directory / f"{unit.number}.json"
            record = _read(path)
            if record is not None and self._holds(unit, record):
                kept.append(unit)
                progress(unit.size)
                return
            path.unlink(missing_ok=True)
            write_json(path, self.write(unit, advance))

        mine = share(self.units, [unit.size for unit in self.units], world)[rank]
        for_each(do, mine, threads, stop)
        return len(kept)

    def _holds(self, unit: Unit, record: Record) -> bool:
        try:
            return self.holds(unit, record)
        except (KeyError, TypeError, ValueError, AttributeError):  # not a record of this unit
            return False

    def records(self, partial: Path) -> list[Record]:
        """Of all units in order, when all ranks are done; removes them. ValueError when one lacks."""
        found = [_read(partial / RECORDS / f"{unit.number}.json") for unit in self.units]
        complete = [record for record in found if record is not None]
        if len(complete) < len(found):
            raise ValueError(f"{len(found) - len(complete)} of {len(found)} units were not written: start again")
        shutil.rmtree(partial / RECORDS)
        return complete


def kept_report(kept: int, units: int) -> str:
    """The last part of a message about an attempt."""
    return f"; {kept} of {units} units were kept from an earlier attempt" if kept else ""


def _read(path: Path) -> Record | None:
    """A record; None if there is none or it cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def write_json(path: Path, content: Record) -> None:
    """Write a file atomically: completely or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, path)
