"""Resumed conversions: data on disk is kept only if it matches its record."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import contents, write_random

from conversion import hf_to_megatron, megatron_to_hf, units
from conversion.publish import working_directory
from conversion.units import RECORDS, cut

CONVERTERS: dict[str, Any] = {"in": hf_to_megatron, "out": megatron_to_hf}


class Interrupted(BaseException):
    pass


def after(bytes_done: int) -> Callable[[int], None]:
    """A progress callback that interrupts."""
    left = bytes_done

    def progress(count: int) -> None:
        nonlocal left
        left -= count
        if left < 0:
            raise Interrupted

    return progress


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The sources of each direction, with small units, so that there are many."""
    monkeypatch.setattr(units, "SMALLEST", 2000)
    directory = write_random(tmp_path / "hf")
    hf_to_megatron.convert(directory, tmp_path / "megatron")
    return {"in": directory, "out": tmp_path / "megatron"}


def interrupt(direction: str, source: Path, out: Path, **more: Any) -> Path:
    """Run an attempt that stops halfway; return its private directory."""
    with pytest.raises(Interrupted):
        CONVERTERS[direction].convert(source, out, resume=True, progress=after(12_000), **more)
    assert not out.exists()
    return working_directory(out)


def finished(direction: str, source: Path, out: Path, **more: Any) -> tuple[str, dict[str, bytes]]:
    report = CONVERTERS[direction].convert(source, out, **more)
    assert not working_directory(out).parent.exists()
    return report, contents(out)


@pytest.mark.parametrize("direction", CONVERTERS)
def test_a_continued_conversion_ends_in_the_bytes_of_one_that_was_not_interrupted(
    sources: dict[str, Path], tmp_path: Path, direction: str
) -> None:
    source, out = sources[direction], tmp_path / "to"
    partial = interrupt(direction, source, out)
    done = len(list((partial / RECORDS).glob("*.json")))
    report, found = finished(direction, source, out, resume=True, threads=2)
    assert done > 2 and f"{done} of " in report and "units were kept" in report
    assert found == finished(direction, source, tmp_path / "at once")[1]


@pytest.mark.parametrize("direction", CONVERTERS)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "record cut", "record of nothing", "record of less"])
def test_what_is_not_as_its_record_says_is_written_again(
    sources: dict[str, Path], tmp_path: Path, direction: str, damage: str
) -> None:
    source, out = sources[direction], tmp_path / "to"
    partial = interrupt(direction, source, out)
    file = partial / ("__0_0.distcp" if direction == "in" else "model.safetensors")
    record = partial / RECORDS / "0.json"
    if damage == "flipped":
        content = bytearray(file.read_bytes())
        content[4000 if direction == "in" else 3000] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        os.truncate(file, 3000)
    elif damage == "gone":
        file.unlink()
    else:
        text = record.read_text()
        nothing = {**json.loads(text), "digests": {}, "segments": {}}
        record.write_text({"record cut": text[:20], "record of nothing": "[]"}.get(damage, json.dumps(nothing)))
    before = len(list((partial / RECORDS).glob("*.json")))
    report, found = finished(direction, source, out, resume=True)
    all_but = before - 1 if direction == "in" or damage not in ("cut", "gone") else 0
    assert (f"{all_but} of " in report) if all_but else ("kept" not in report)
    assert found == finished(direction, source, tmp_path / "at once")[1]


@pytest.mark.parametrize("direction", CONVERTERS)
@pytest.mark.parametrize("change", ["without --resume", "another dtype", "another source"])
def test_a_leftover_of_anything_else_is_not_continued(
    sources: dict[str, Path], tmp_path: Path, direction: str, change: str
) -> None:
    source, out = sources[direction], tmp_path / "to"
    interrupt(direction, source, out)
    options: dict[str, Any] = {"resume": change != "without --resume"}
    if change == "another dtype":
        options["dtype"] = torch.bfloat16
    if change == "another source":
        os.utime(source / ("model.safetensors" if direction == "in" else "__0_1.distcp"))
    report, found = finished(direction, source, out, **options)
    assert "kept" not in report
    assert found == finished(direction, source, tmp_path / "at once", dtype=options.get("dtype"))[1]


def test_an_error_of_the_source_does_not_become_a_record(sources: dict[str, Path], tmp_path: Path) -> None:
    source, out = sources["out"], tmp_path / "to"
    file = source / "__0_3.distcp"
    content = bytearray(file.read_bytes())
    content[1500] ^= 1
    file.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ValueError, match="the manifest promises"):
            megatron_to_hf.convert(source, out, resume=True)
    assert not (working_directory(out) / RECORDS / "3.json").exists() and not out.exists()


def test_a_refusal_before_anything_is_written_leaves_nothing(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        hf_to_megatron.convert(sources["in"], tmp_path / "to", resume=True)
    assert not working_directory(tmp_path / "to").parent.exists()


def test_units_depend_on_the_model_alone_and_hold_every_parameter_once() -> None:
    sizes = {str(number): (7 * number) % 50 << 20 for number in range(200)}
    found = cut(sizes)
    assert [name for unit in found for name in unit.names] == list(sizes)
    assert sum(unit.size for unit in found) == sum(sizes.values())
    assert [unit.number for unit in found] == list(range(len(found)))
    most = max(unit.size for unit in found)
    assert units.SMALLEST <= most <= units.SMALLEST + (50 << 20) or most <= sum(sizes.values()) // units.ABOUT
