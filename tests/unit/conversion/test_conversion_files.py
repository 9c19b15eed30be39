"""Checkpoint files: other tools can read them, damaged ones are refused, interrupted writes leave none."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import pickle
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import LLAMA, contents

import conversion
from conversion import cli, hf_to_megatron, megatron_to_hf, megatron_writer
from conversion.hf_files import HFReader, plan_shards
from conversion.megatron_reader import MegatronReader, SafeUnpickler
from conversion.publish import ManifestError, check_manifest, published, working_directory, write_manifest
from conversion.sources import open_source
from conversion.verify import compare

BFLOAT16 = {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "dtype": "bfloat16"}
RAW = {key: value for key, value in LLAMA.items() if key != "torch_dtype"} | BFLOAT16


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    """A two-file bfloat16 Llama with an index, a tokenizer file, and code that must not be copied."""
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(RAW, indent=3))  # unusual indentation: must be kept
    (directory / "tokenizer.json").write_text("{}")
    (directory / "modeling_evil.py").write_text("raise SystemExit")
    torch.manual_seed(0)
    state = {name: torch.randn(shape).bfloat16() for name, shape in conversion.hf_shapes(parsed()).items()}
    names = sorted(state)
    files = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for file, members in files.items():
        save_file({name: state[name] for name in members}, directory / file)
    weight_map = {name: file for file, members in files.items() for name in members}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def parsed() -> conversion.HFConfig:
    return conversion.parse_config(RAW)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("block_bytes", [1, 200, 1 << 24])
@pytest.mark.parametrize(("shard_size", "files"), [(10**9, 1), (3000, 5)])
def test_round_trip_is_bit_identical_whatever_the_blocks(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, shard_size: int, files: int
) -> None:
    monkeypatch.setattr(megatron_writer, "BLOCK_BYTES", block_bytes)
    before = contents(hf_dir)
    hf_to_megatron.convert(hf_dir, tmp_path / "megatron", threads=2)
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back", threads=2, max_shard_size=shard_size)
    first, second = tensors(hf_dir), tensors(tmp_path / "back")
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert all(tensor.dtype == torch.bfloat16 for tensor in second.values())
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf_dir / name).read_bytes()
    assert not list((tmp_path / "back").glob("*.py"))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) >= files
    assert contents(hf_dir) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "megatron", "source"]


def test_nothing_written_names_a_directory_of_this_machine(hf_dir: Path, tmp_path: Path) -> None:
    hf_to_megatron.convert(hf_dir, tmp_path / "megatron")
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back", card={"step": 7, "recipe": "demo"})
    for directory in ("megatron", "back"):
        for name, data in contents(tmp_path / directory).items():
            assert tmp_path.name.encode() not in data, name  # pickles store the parts of a path, not its string
    card = (tmp_path / "back" / "README.md").read_text()
    assert "Step: 7" in card and "Recipe: demo" in card and 'base_model: "source"' in card


def test_dtype_is_cast_once_and_written_in_the_config(hf_dir: Path, tmp_path: Path) -> None:
    hf_to_megatron.convert(hf_dir, tmp_path / "megatron", dtype=torch.float32)
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back", dtype=torch.float16)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {**RAW, "dtype": "float16"}
    expected = tensors(hf_dir)
    assert all(torch.equal(t, expected[n].float().half()) for n, t in tensors(tmp_path / "back").items())


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


def damage_truncated(d: Path) -> None:
    path = d / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def damage_header(d: Path) -> None:
    path = d / "model-00001-of-00002.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def damage_traversal(d: Path) -> None:
    index = json.loads((d / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../source/model-00002-of-00002.safetensors"  # exists
    (d / "model.safetensors.index.json").write_text(json.dumps(index))


def damage_dtype(d: Path) -> None:
    rewrite(
        d / "model-00002-of-00002.safetensors",
        lambda s: s.update({"model.norm.weight": torch.zeros(16, dtype=torch.int8)}),
    )


def damage_extra(d: Path) -> None:
    rewrite(d / "model-00002-of-00002.safetensors", lambda s: s.update({"model.mystery.weight": torch.zeros(1)}))


def damage_mixed(d: Path) -> None:
    name = "model.layers.2.input_layernorm.weight"
    rewrite(d / "model-00002-of-00002.safetensors", lambda s: s.update({name: s[name].float()}))


DAMAGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "truncated": (damage_truncated, ["model-00002-of-00002.safetensors", "truncated"]),
    "header": (damage_header, ["model-00001-of-00002.safetensors", "not a safetensors file"]),
    "traversal": (damage_traversal, ["../source/", "not a plain *.safetensors file name"]),
    "missing shard": (
        lambda d: (d / "model-00002-of-00002.safetensors").unlink(),
        ["model-00002-of-00002.safetensors", "does not exist"],
    ),
    "dtype": (damage_dtype, ["model.norm.weight", "I8"]),
    "extra": (damage_extra, ["model.mystery.weight", "LlamaForCausalLM"]),
    "config shape": (
        lambda d: (d / "config.json").write_text(json.dumps({**RAW, "intermediate_size": 32})),
        ["model.layers.0.mlp.gate_proj.weight", "(24, 16)", "(32, 16)"],
    ),
    "config layers": (
        lambda d: (d / "config.json").write_text(json.dumps({**RAW, "num_hidden_layers": 4})),
        ["model.layers.3.", "config.json implies"],
    ),
    "config json": (lambda d: (d / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
    "mixed dtypes": (damage_mixed, ["layer_norm_weight", "float32", "bfloat16", "--dtype"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_source_is_refused_in_a_sentence_and_nothing_is_left(hf_dir: Path, tmp_path: Path, damage: str) -> None:
    spoil, words = DAMAGES[damage]
    spoil(hf_dir)
    before = contents(hf_dir)
    with pytest.raises(ValueError) as error:
        hf_to_megatron.convert(hf_dir, tmp_path / "out", threads=2)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"] and contents(hf_dir) == before


def test_tied_model_with_a_different_output_layer_is_refused(hf_dir: Path, tmp_path: Path) -> None:
    (hf_dir / "config.json").write_text(json.dumps({**RAW, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        hf_to_megatron.convert(hf_dir, tmp_path / "out")


@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
def test_full_disk_is_one_sentence_and_leaves_nothing(hf_dir: Path, tmp_path: Path, direction: str) -> None:
    converter, source = hf_to_megatron, hf_dir
    if direction == "to hf":
        hf_to_megatron.convert(hf_dir, tmp_path / "megatron")
        converter, source = megatron_to_hf, tmp_path / "megatron"
    before = contents(source)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))  # the kernel refuses the rest of a larger file
    try:
        with pytest.raises(ValueError, match="no space left for .*out .*: free some"):
            converter.convert(source, tmp_path / "out", threads=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists() and not working_directory(tmp_path / "out").parent.exists()
    assert contents(source) == before


@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
def test_a_shard_that_cannot_be_read_is_named(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    hf_to_megatron.convert(hf_dir, tmp_path / "megatron")
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ValueError, match=r"(model-0000\d-of-00002|a stored piece of ).*cannot be read .*Input/output"):
        if direction == "to megatron":
            hf_to_megatron.convert(hf_dir, tmp_path / "out")
        else:
            megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_replacing_keeps_the_old_directory_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with published(out) as partial:
        (partial / "version").write_text("1")
        write_manifest(partial)
    with pytest.raises(ValueError, match="exists already"), published(out):
        pass
    with pytest.raises(KeyError), published(out, overwrite=True) as partial:
        (partial / "version").write_text("2")
        raise KeyError
    assert (out / "version").read_text() == "1"
    with published(out, overwrite=True) as partial:
        (partial / "version").write_text("3")
        write_manifest(partial)
        with pytest.raises(ValueError, match="another process is writing"), published(out, overwrite=True):
            pass
    assert (out / "version").read_text() == "3" and [p.name for p in tmp_path.iterdir()] == ["out"]
    old = working_directory(out).with_name("old")
    old.parent.mkdir()
    (old.parent / "temporary-of-megatron-gppo").touch()
    out.rename(old)  # as if killed between the two renames of a replacement
    with pytest.raises(ValueError, match="exists already"), published(out):
        pass
    assert (out / "version").read_text() == "3"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_found(hf_dir: Path, tmp_path: Path) -> None:
    hf_to_megatron.convert(hf_dir, tmp_path / "megatron")
    flip(tmp_path / "megatron" / ".metadata", 100)
    with pytest.raises(ManifestError, match=".metadata does not have the bytes"):
        MegatronReader(tmp_path / "megatron")
    flip(tmp_path / "megatron" / ".metadata", 100)
    flip(tmp_path / "megatron" / "__0_0.distcp", 4000)
    with pytest.raises(ManifestError, match="__0_0.distcp does not have the bytes"):
        check_manifest(tmp_path / "megatron", contents=True)


def test_a_difference_is_described_by_tensor_place_and_size(hf_dir: Path, tmp_path: Path) -> None:
    hf_to_megatron.convert(hf_dir, tmp_path / "megatron")
    name = "model.layers.1.mlp.up_proj.weight"
    path = next(p for p in hf_dir.glob("*.safetensors") if name in load_file(p))

    def change(state: dict[str, torch.Tensor]) -> None:
        state[name][2, 3] += 1

    rewrite(path, change)
    found = compare(open_source(hf_dir), open_source(tmp_path / "megatron"))
    assert (found.compared, found.different) == (30, 1)
    assert name in found.first and "1 of 384 values differ" in found.first and "at (2, 3)" in found.first


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/conversion-was-here",)


def test_a_hostile_pickle_is_refused_without_running(hf_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "megatron"
    hf_to_megatron.convert(hf_dir, out)
    (out / "manifest.json").unlink()
    (out / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="posix.system is not part of a checkpoint's metadata: refused"):
        MegatronReader(out)
    assert not Path("/tmp/conversion-was-here").exists()


def test_stored_file_names_cannot_leave_the_directory(hf_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "megatron"
    hf_to_megatron.convert(hf_dir, out)
    (out / "manifest.json").unlink()
    with (out / ".metadata").open("rb") as file:
        metadata = SafeUnpickler(file).load()
    next(iter(metadata.storage_data.values())).relative_path = "../__0_0.distcp"
    (out / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="not a plain file name: refused"):
        MegatronReader(out)


def test_checkpoint_of_another_model_is_refused(hf_dir: Path, tmp_path: Path) -> None:
    hf_to_megatron.convert(hf_dir, tmp_path / "megatron")
    other = tmp_path / "other"
    other.mkdir()
    for change, words in (
        ({"num_hidden_layers": 2}, "config.json belongs to another model"),
        ({"tie_word_embeddings": True, "hidden_size": 20}, "config.json belongs to another model"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "lacks decoder.layers.self_attention.linear_qkv.bias"),
    ):
        (other / "config.json").write_text(json.dumps({**RAW, **change}))
        with pytest.raises(ValueError, match=words):
            MegatronReader(tmp_path / "megatron", other)


def test_shards_are_filled_in_order_and_a_large_tensor_stands_alone() -> None:
    assert plan_shards({"a": 3, "b": 4, "c": 9, "d": 1, "e": 4}, 7) == [["a", "b"], ["c"], ["d", "e"]]


def test_rows_are_read_without_the_rest(hf_dir: Path) -> None:
    reader = HFReader(hf_dir)
    name = "model.embed_tokens.weight"
    assert torch.equal(reader.rows(name, 5, 9), tensors(hf_dir)[name][5:9])
    reader.close()


@pytest.mark.parametrize("command", ["hf_to_megatron", "megatron_to_hf", "verify", "inspect"])
def test_commands_fail_in_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {
        "hf_to_megatron": ["--hf", str(tmp_path / "no"), "--out", str(tmp_path / "out")],
        "megatron_to_hf": ["--megatron", str(tmp_path / "no"), "--out", str(tmp_path / "out")],
    }.get(command, [str(tmp_path / "no")])
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    with pytest.raises(SystemExit) as status:
        cli.run(importlib.import_module(f"conversion.{command}").main)
    error = capsys.readouterr().err
    assert status.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1


def test_commands_do_what_they_say(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron, back = str(tmp_path / "megatron"), str(tmp_path / "back")
    for command, arguments, status, words in (
        ("hf_to_megatron", ["--hf", str(hf_dir), "--out", megatron], 0, "MiB/s"),
        ("megatron_to_hf", ["--megatron", megatron, "--out", back, "--max-shard-size", "4KB"], 0, "MiB/s"),
        ("verify", [str(hf_dir), back, "--no-logits"], 0, "all 30 tensors are equal bit for bit"),
        ("verify", [megatron], 0, "manifest verified"),
        ("inspect", [megatron, "--tensors"], 0, "decoder.layers.mlp.linear_fc1.weight"),
        ("inspect", [back], 0, "30 bfloat16"),
    ):
        monkeypatch.setattr(sys, "argv", [command, *arguments])
        with pytest.raises(SystemExit) as exit_status:
            cli.run(importlib.import_module(f"conversion.{command}").main)
        output = capsys.readouterr()
        assert exit_status.value.code == status and words in output.out + output.err, output


def test_sizes_are_read_as_people_write_them() -> None:
    assert [cli.size(text) for text in ("5GB", "1.5MiB", "7", "2kb")] == [5 * 10**9, 3 * 2**19, 7, 2000]
    with pytest.raises(argparse.ArgumentTypeError, match="'5 parsecs' is not a size"):
        cli.size("5 parsecs")
