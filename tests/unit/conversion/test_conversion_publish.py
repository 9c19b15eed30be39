"""Foreign files are kept: only a checkpoint of this project is replaced, and only on request."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoint import contents, write_random

from conversion import cli, hf_to_megatron, megatron_to_hf, publish
from conversion.publish import MANIFEST, published, working_directory, write_manifest


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    return write_random(tmp_path / "source")


def publish_text(out: Path, text: str, *, overwrite: bool = False) -> None:
    with published(out, overwrite) as partial:
        (partial / "version").write_text(text)
        write_manifest(partial)


@pytest.mark.parametrize("exchange", [True, False], ids=["atomic exchange", "two renames"])
def test_neighbours_with_telling_names_are_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "_rename", lambda *_: False)
    out = tmp_path / "out"
    for name in ("out.old", "out.partial", "out.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text(name)
    before = contents(tmp_path)
    publish_text(out, "1")
    publish_text(out, "2", overwrite=True)
    after = contents(tmp_path)
    assert after.pop("out/version") == b"2" and after.pop(f"out/{MANIFEST}")
    assert after == before and len(list(tmp_path.iterdir())) == 4


def make_notes(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")


def make_download(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_text("weights of another tool")


def make_checkpoint_with_notes(out: Path) -> None:
    publish_text(out, "1")
    (out / "deep").mkdir()
    (out / "deep" / "notes.txt").write_text("mine")


def make_parent_of_checkpoint(out: Path) -> None:
    out.mkdir()
    publish_text(out / "inner", "1")


def make_link_inside(out: Path) -> None:
    publish_text(out, "1")
    (out / "data").symlink_to("/")


def make_other_manifest(out: Path) -> None:
    out.mkdir()
    (out / MANIFEST).write_text('{"manifest_version": 3}')


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_notes, "notes.txt"),
        (make_download, "config.json and 1 more files"),
        (make_checkpoint_with_notes, "deep/notes.txt"),
        (make_parent_of_checkpoint, "inner/manifest.json"),
        (make_link_inside, "holds data"),
        (make_other_manifest, "not a manifest of a known format"),
        (lambda out: out.write_text("a file"), "is not a directory"),
    ],
)
def test_what_is_not_a_checkpoint_of_this_project_is_not_replaced(
    tmp_path: Path, make: Callable[[Path], object], words: str
) -> None:
    out = tmp_path / "out"
    make(out)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=words), published(out, overwrite=True):
        raise AssertionError("must not begin")
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_added_during_a_conversion_is_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish_text(out, "1")
    with pytest.raises(ValueError, match="late.txt"), published(out, overwrite=True):
        (out / "late.txt").write_text("mine")
    assert (out / "version").read_text() == "1" and (out / "late.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="made by another process|exists already"), published(tmp_path / "new"):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "theirs").write_text("mine")
    assert (tmp_path / "new" / "theirs").is_file()


@pytest.mark.parametrize("where", ["itself", "parent", "inside", "through a link"])
@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
def test_output_that_overlaps_the_source_is_refused(hf_dir: Path, tmp_path: Path, where: str, direction: str) -> None:
    source = hf_dir
    if direction == "to hf":
        source = tmp_path / "models" / "megatron"
        hf_to_megatron.convert(hf_dir, source)
    (tmp_path / "link").symlink_to(source)
    out = {
        "itself": source,
        "parent": source.parent,
        "inside": source / "new",
        "through a link": tmp_path / "link" / "new",
    }[where]
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="overlaps|current directory|is not replaced"):
        (megatron_to_hf if direction == "to hf" else hf_to_megatron).convert(source, out, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("inside", [False, True])
def test_another_name_of_the_source_is_no_output(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """A bind mount, whose name does not reveal it; here a link that is not resolved."""
    hf_to_megatron.convert(hf_dir, tmp_path / "megatron")
    (tmp_path / "other name").symlink_to(tmp_path / "megatron")
    monkeypatch.setattr("conversion.publish.os.path.realpath", lambda path, **_: os.path.abspath(path))
    before = contents(tmp_path / "megatron")
    with pytest.raises(ValueError, match="overlaps source"):
        out = tmp_path / "other name" / ("new" if inside else "")
        megatron_to_hf.convert(tmp_path / "megatron", out, overwrite=True)
    assert contents(tmp_path / "megatron") == before


@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
def test_a_source_that_changes_while_it_is_read_is_an_error(hf_dir: Path, tmp_path: Path, direction: str) -> None:
    source, file = hf_dir, "model.safetensors"
    if direction == "to hf":
        source, file = tmp_path / "megatron", "__0_0.distcp"
        hf_to_megatron.convert(hf_dir, source)
    (source / MANIFEST).unlink(missing_ok=True)  # with one, the bytes are compared

    def change(_: int) -> None:
        with (source / file).open("r+b") as opened:
            opened.seek(-8, os.SEEK_END)
            opened.write(b"trained!")

    with pytest.raises(ValueError, match=f"{file} changed while the source was read"):
        (megatron_to_hf if direction == "to hf" else hf_to_megatron).convert(source, tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_model_is_not_published_but_a_hub_cache_is_read(hf_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    (hf_dir / "notes.txt").symlink_to(tmp_path / "key")
    with pytest.raises(ValueError, match=r"notes.txt is a link to .*key, outside the model"):
        hf_to_megatron.convert(hf_dir, tmp_path / "out")
    (hf_dir / "notes.txt").unlink()
    snapshot = tmp_path / "cache" / "snapshots" / "revision"
    snapshot.mkdir(parents=True)
    hf_dir.rename(tmp_path / "cache" / "blobs")
    for file in (tmp_path / "cache" / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs", file.name))
    hf_to_megatron.convert(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "hf" / "config.json").is_file()


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_the_current_directory_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    with pytest.raises(ValueError, match="give the name of a directory to be made"), published(out, overwrite=True):
        pass


def test_an_output_that_is_a_link_is_written_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch" / "real")
    publish_text(tmp_path / "out", "1")
    publish_text(tmp_path / "out", "2", overwrite=True)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "scratch" / "real" / "version").read_text() == "2"


def test_a_directory_under_the_private_name_is_taken_over_only_with_the_mark(tmp_path: Path) -> None:
    work = working_directory(tmp_path / "out").parent
    work.mkdir()
    (work / "thesis").write_text("mine")
    with pytest.raises(ValueError, match="was not made for them: move it"), published(tmp_path / "out"):
        pass
    assert (work / "thesis").read_text() == "mine" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_conversion_and_leaves_nothing(
    hf_dir: Path, tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        hf_to_megatron.convert(hf_dir, tmp_path / "out", threads=2, progress=lambda _: os.kill(os.getpid(), number))
        return 0

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 128 + number and "nothing was left behind" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"] and signal.getsignal(number) == before
