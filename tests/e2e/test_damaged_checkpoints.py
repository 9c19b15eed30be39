"""A damaged newest checkpoint is refused with the name of the newest intact one, and skipped on request."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import arguments, assert_same_run, launch_here, run_here

from conversion.digests import range_digest
from megatron_ext.learner.learner import Learner

pytestmark = pytest.mark.usefixtures("no_report")
SETTINGS = ("eval.every=0", "train.entropy_probe_every=0", "train.save_every=1", "train.keep_checkpoints=3")


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_here(model, tmp_path_factory.mktemp("runs") / "run", *SETTINGS)


def largest(directory: Path) -> Path:
    return max(directory.rglob("*.distcp"), key=lambda path: path.stat().st_size)


def flip(directory: Path) -> None:
    data = bytearray(largest(directory).read_bytes())
    data[len(data) // 2] ^= 4
    largest(directory).write_bytes(data)


def truncate(directory: Path) -> None:
    file = largest(directory)
    file.write_bytes(file.read_bytes()[:-1])


def diverge(directory: Path) -> None:
    """Write a checkpoint with NaN weights and a valid manifest, as a diverged run would."""
    file, path = largest(directory), directory / "manifest.json"
    manifest = json.loads(path.read_text())
    segments = manifest["files"][file.relative_to(directory).as_posix()]["segments"]
    starts = [*map(int, segments), file.stat().st_size]
    start, stop = max(itertools.pairwise(starts), key=lambda span: span[1] - span[0])
    data = bytearray(file.read_bytes())
    middle = start + (stop - start) // 2 // 64 * 64
    data[middle : middle + 4] = struct.pack("<f", math.nan)
    file.write_bytes(data)
    segments[str(start)] = range_digest(file, start, stop)
    path.write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda last: flip(last), "does not have the bytes that the manifest promises"),
    "a truncated file": (truncate, "bytes but the manifest says"),
    "a torn manifest": (lambda last: (last / "manifest.json").write_text('{"format"'), "is not a manifest"),
    "no manifest": (lambda last: (last / "manifest.json").unlink(), "has no manifest"),
    "a NaN": (diverge, "values that are not finite in decoder"),
    "a missing directory": (shutil.rmtree, "names 'step_000004', which is not a checkpoint there"),
    "a pointer elsewhere": (lambda last: (last.parent / "latest").write_text("step_000099\n"), "names 'step_000099'"),
    "a torn pointer": (lambda last: (last.parent / "latest").write_bytes(b"\0\0"), "which is not a checkpoint there"),
    "no pointer": (lambda last: (last.parent / "latest").unlink(), "latest is missing, although there are checkpoints"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_is_refused_and_passed_over_on_request(
    damage: str, finished: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    act, sentence = DAMAGES[damage]
    act(run / "checkpoints" / "step_000004")
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert launch_here(arguments(model, run, *SETTINGS)) == 2
    said = capsys.readouterr().err
    intact = "step_000004" if "pointer" in damage else "step_000003"
    assert said.startswith("error: ") and said.count("\n") == 1 and sentence in said, said
    assert f"The newest intact checkpoint is {intact}: resume=latest_valid continues from it" in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before, "nothing is touched"

    assert launch_here(arguments(model, run, *SETTINGS, "resume=latest_valid")) == 0
    assert "resume=latest_valid: " in capsys.readouterr().out, "never silently"
    assert (run / "checkpoints" / "latest").read_text() == "step_000004\n"
    aside = [path.name for path in (run / "checkpoints").glob("*.damaged")]
    assert aside == (["step_000004.damaged"] if "pointer" not in damage and "directory" not in damage else [])
    assert_same_run(finished, run)


def test_an_older_checkpoint_is_continued_without_losing_what_is_written_next(model: Path, tmp_path: Path) -> None:
    """The user names an older checkpoint. Checkpoints written from there count as newer than the previous ones,
    whatever their step numbers: the old history is pruned."""
    one = ("eval.every=0", "train.entropy_probe_every=0", "train.save_every=1", "train.keep_checkpoints=2")
    run = run_here(model, tmp_path / "run", *one)
    (run / "checkpoints" / "latest").write_text("step_000003\n")
    from megatron_ext.learner import checkpoint

    order = [path.name for path in checkpoint.by_write_order(run / "checkpoints")]
    assert order == ["step_000003", "step_000004"]
    shutil.move(run / "checkpoints" / "step_000004", run / "checkpoints" / "step_000009")
    run_here(model, run, *one, "train.steps=5")
    kept = [path.name for path in checkpoint.by_write_order(run / "checkpoints")]
    assert kept == ["step_000004", "step_000005"], "not the one with the largest number"


def test_a_diverged_run_is_not_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When only one checkpoint is kept, writing it would remove the last good one."""
    run, one = tmp_path / "run", (*SETTINGS[:3], "train.keep_checkpoints=1")
    original, calls = Learner.update, iter(range(100))

    def diverging(learner: Learner, *args: Any, **kwargs: Any) -> Any:
        done = original(learner, *args, **kwargs)
        if next(calls) == 3:  # the last update of step 2
            next(iter(learner.chunks[0].parameters())).data.view(-1)[5] = math.inf
        return done

    monkeypatch.setattr(Learner, "update", diverging)
    assert launch_here(arguments(model, run, *one)) == 5
    assert "holds a NaN or an infinity: no checkpoint is written, the last one stays" in capsys.readouterr().err
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_000001"]
    monkeypatch.undo()
    assert launch_here(arguments(model, run, *one)) == 0
