"""Weights that are pickles: refused unless explicitly allowed, and then no code in them runs."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import SIZES

import conversion
from conversion import hf_to_megatron
from conversion.pickled import INDEX, SINGLE, PickledReader
from conversion.sources import HFSource, open_source
from conversion.verify import compare

RAW = {"architectures": ["LlamaForCausalLM"], **SIZES}
State = dict[str, Any]


def make(directory: Path, shards: int = 1, change: State | None = None) -> State:
    """A directory of `pytorch_model*.bin`; `change` replaces or adds tensors in the last file."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(RAW))
    shapes = conversion.hf_shapes(conversion.parse_config(RAW))
    state = OrderedDict((name, torch.randn(*shape).bfloat16()) for name, shape in shapes.items())
    names = list(state)
    files = {f"pytorch_model-{i}.bin" if shards > 1 else SINGLE: names[i::shards] for i in range(shards)}
    for file, members in files.items():
        last = file == list(files)[-1]
        torch.save(OrderedDict((n, state[n]) for n in members) | (change or {} if last else {}), directory / file)
    if shards > 1:
        weight_map = {name: file for file, members in files.items() for name in members}
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return dict(state)


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_convert_when_asked_for(tmp_path: Path, shards: int) -> None:
    make(tmp_path / "bin", shards)
    with pytest.raises(ValueError, match="pickled weights only: pass --allow-pickle if you trust"):
        hf_to_megatron.convert(tmp_path / "bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hf_to_megatron.convert(tmp_path / "bin", tmp_path / "out", allow_pickle=True, threads=2)
    found = compare(HFSource(tmp_path / "bin", allow_pickle=True), open_source(tmp_path / "out"))
    assert (found.compared, found.different) == (21, 0)
    assert not list((tmp_path / "out").rglob("*.bin"))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Evil.marker),)

    marker = Path()


def hostile_module() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.norm.weight": Evil()}, "holds more than tensors and was refused"),
        ({"model.norm.weight": hostile_module()}, "holds more than tensors and was refused"),
        ({"model.norm.weight": "text"}, "'model.norm.weight', which is not a dense tensor"),
        ({"model.norm.weight": torch.eye(4).to_sparse()}, "'model.norm.weight', which is not a dense tensor"),
        ({"model.norm.weight": torch.zeros(16, dtype=torch.int8)}, "torch.int8"),
        ({"model.mystery.weight": torch.zeros(16)}, "model.mystery.weight"),
    ],
)
def test_a_hostile_or_odd_pickle_is_refused_in_a_sentence(tmp_path: Path, change: State, words: str) -> None:
    Evil.marker = tmp_path / "was-here"
    make(tmp_path / "bin", change=change)
    with pytest.raises(ValueError, match=words) as error:
        hf_to_megatron.convert(tmp_path / "bin", tmp_path / "out", allow_pickle=True)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_files_that_are_cut_or_outside_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "bin", 2)
    path = tmp_path / "bin" / "pytorch_model-1.bin"
    whole = path.read_bytes()
    for kept in (whole[: len(whole) // 2], whole[:100], b"", b"not a zip file"):
        path.write_bytes(kept)
        with pytest.raises(ValueError, match="pytorch_model-1.bin (is truncated or not in|holds more than)"):
            PickledReader(tmp_path / "bin")
    path.rename(tmp_path / "outside.bin")
    index = (tmp_path / "bin" / INDEX).read_text()
    (tmp_path / "bin" / INDEX).write_text(index.replace(path.name, "../outside.bin"))
    with pytest.raises(ValueError, match="'../outside.bin', which is not a plain \\*.bin file name: refused"):
        PickledReader(tmp_path / "bin")
    (tmp_path / "bin" / INDEX).write_text(index)
    with pytest.raises(ValueError, match="'pytorch_model-1.bin', which does not exist"):
        PickledReader(tmp_path / "bin")
