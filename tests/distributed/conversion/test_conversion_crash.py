"""Conversions that are killed: the checkpoint at the destination is complete, either the old one or the new one.

Real processes, real SIGKILL; no Megatron, no gloo.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import contents, write_random

from conversion import hf_to_megatron, megatron_to_hf, publish, units
from conversion.publish import published, working_directory, write_manifest
from conversion.sources import open_source
from conversion.together import Team
from conversion.verify import compare

pytestmark = pytest.mark.distributed


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    return write_random(tmp_path / "source")


def dies(target: Callable[..., None], *args: Any) -> None:
    """Run ``target`` in a new process, which must kill itself."""
    child = multiprocessing.get_context("fork").Process(target=target, args=args)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(moment: int) -> Callable[[int], None]:
    """A callback that kills the process when it is called for the `moment`-th time."""
    calls = itertools.count(1)
    return lambda _: die() if next(calls) == moment else None


def convert_and_die(converter: Any, source: Path, out: Path, moment: int) -> None:
    converter.convert(source, out, progress=dying(moment))


@pytest.mark.parametrize("direction", ["in", "out"])
def test_killed_at_any_moment_it_leaves_nothing_that_loads_and_starts_again(
    hf_dir: Path, tmp_path: Path, direction: str
) -> None:
    source, out = hf_dir, tmp_path / "out"
    if direction == "out":
        hf_to_megatron.convert(hf_dir, tmp_path / "megatron")
        source = tmp_path / "megatron"
    converter = hf_to_megatron if direction == "in" else megatron_to_hf
    for moment in (1, 17):
        dies(convert_and_die, converter, source, out, moment)
        assert not out.exists() and working_directory(out).exists()
    converter.convert(source, out)
    assert compare(open_source(hf_dir), open_source(out)).different == 0
    assert not working_directory(out).parent.exists()


def convert_as(rank: int, attempt: str, converter: Any, source: Path, out: Path, moment: int) -> None:
    """One of two processes; dies before its block number `moment`, if it has so many."""
    team = Team(rank, 2, attempt, patience_s=2.0 if moment else 60.0)
    with contextlib.suppress(ValueError) if moment else contextlib.nullcontext():
        converter.convert(source, out, resume=True, team=team, progress=dying(moment))


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("direction", ["in", "out"])
def test_two_processes_of_which_one_is_killed_continue_to_the_bytes_of_one(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str, victim: int
) -> None:
    monkeypatch.setattr(units, "SMALLEST", 2000)
    source, out = hf_dir, tmp_path / "out"
    hf_to_megatron.convert(hf_dir, tmp_path / "megatron")
    converter, alone = (
        (hf_to_megatron, tmp_path / "megatron") if direction == "in" else (megatron_to_hf, tmp_path / "hf")
    )
    if direction == "out":
        source = tmp_path / "megatron"
        converter.convert(source, alone)
    fork = multiprocessing.get_context("fork").Process
    for attempt in ("first", "second"):
        moments = [4 if rank == victim else 1000 for rank in (0, 1)] if attempt == "first" else [0, 0]
        ranks = [
            fork(target=convert_as, args=(rank, attempt, converter, source, out, moment))
            for rank, moment in enumerate(moments)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if attempt == "first":
            assert ranks[victim].exitcode == -signal.SIGKILL and not out.exists()
            assert list((working_directory(out) / units.RECORDS).glob("*.json"))
    assert [process.exitcode for process in ranks] == [0, 0]
    assert contents(out) == contents(alone)
    assert not working_directory(out).parent.exists()


def replace_and_die(out: Path, place: str, atomic: bool) -> None:
    with_flags, rename = publish._rename, Path.rename

    def exchange_then_die(a: Path, b: Path, flag: int) -> bool:
        return with_flags(a, b, flag) and bool(die())

    def rename_then_die(self: Path, target: Path) -> Path:
        result = rename(self, target)
        if target.name == ("old" if place == "between the renames" else "out"):
            die()
        return result

    if place == "before":
        publish._sync_tree = die
    elif atomic:
        publish._rename = exchange_then_die
    else:
        publish._rename, Path.rename = (lambda a, b, flag: False), rename_then_die  # type: ignore[method-assign]
    with published(out, overwrite=True) as partial:
        (partial / "version").write_text("new")
        write_manifest(partial)


@pytest.mark.parametrize(
    ("atomic", "place", "left"),
    [
        (True, "before", "old"),
        (True, "after the exchange", "new"),
        (False, "before", "old"),
        (False, "between the renames", "old"),
        (False, "after the renames", "new"),
    ],
)
def test_a_replacement_killed_at_any_point_leaves_the_old_or_the_new_directory(
    tmp_path: Path, atomic: bool, place: str, left: str
) -> None:
    out = tmp_path / "out"
    with published(out) as partial:
        (partial / "version").write_text("old")
        write_manifest(partial)
    dies(replace_and_die, out, place, atomic)
    there = working_directory(out).with_name("old") if place == "between the renames" else out
    assert (there / "version").read_text() == left
    with pytest.raises(ValueError, match="exists already"), published(out):
        pass  # an attempt that may not replace puts everything back in order
    assert (out / "version").read_text() == left
    with published(out, overwrite=True) as partial:
        assert not list(partial.iterdir())
        (partial / "version").write_text("newest")
        write_manifest(partial)
    assert (out / "version").read_text() == "newest" and [path.name for path in tmp_path.iterdir()] == ["out"]
