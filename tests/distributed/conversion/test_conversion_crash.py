"""Conversions that are killed: what is at the destination is complete, the old one or the new one.

Real processes, real SIGKILL; no Megatron, no gloo.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import conversion
from conversion import hf_to_megatron, megatron_to_hf, publish
from conversion.publish import published, working_directory, write_manifest
from conversion.sources import open_source
from conversion.verify import compare

pytestmark = pytest.mark.distributed
RAW = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(RAW))
    shapes = conversion.hf_shapes(conversion.parse_config(RAW))
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, directory / "model.safetensors")
    return directory


def dies(target: Callable[..., None], *args: Any) -> None:
    """Run in a process of its own, which must kill itself."""
    child = multiprocessing.get_context("fork").Process(target=target, args=args)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def convert_and_die(converter: Any, source: Path, out: Path, moment: int) -> None:
    left = moment

    def progress(_: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            die()

    converter.convert(source, out, progress=progress)


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
