"""Damage is never certified: data is compared with the manifest, and numbers are checked for NaN and infinity."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import QWEN2

import conversion
from conversion import cli, hf_to_megatron, megatron_to_hf, verify
from conversion.hf_files import HFReader
from conversion.megatron_reader import read_metadata
from conversion.publish import MANIFEST, write_manifest
from conversion.sources import open_source
from conversion.values import Values, count_nonfinite
from conversion.verify import compare, config_differences

RAW = {**QWEN2, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
VICTIM = "model.layers.1.mlp.up_proj.weight"


def write_model(directory: Path, seed: int = 0) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(RAW))
    generator = torch.Generator().manual_seed(seed)
    shapes = conversion.hf_shapes(conversion.parse_config(RAW))
    state = {n: torch.randn(shape, generator=generator).bfloat16() for n, shape in shapes.items()}
    save_file(state, directory / "model.safetensors")
    return directory


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """The same weights three times: as downloaded, imported, and exported again (with a manifest)."""
    source = write_model(tmp_path / "source")
    hf_to_megatron.convert(source, tmp_path / "megatron", threads=2)
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "hf")
    return {name: tmp_path / name for name in ("source", "megatron", "hf")}


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 16]))


def place_of(directory: Path, name: str) -> tuple[Path, int]:
    """Position on disk of a number in the middle of a tensor, in either kind of checkpoint."""
    if (directory / "model.safetensors").is_file():
        where = HFReader(directory).tensors[name]
        return where.path, where.offset + 40
    data = next(p for i, p in read_metadata(directory).storage_data.items() if "fc1.weight" in i.fqn and i.offset[0])
    return directory / data.relative_path, data.offset + data.length // 2


def forget_segments(directory: Path) -> None:
    """Replace the manifest by one with checksums of whole files only."""
    (directory / MANIFEST).unlink()
    write_manifest(directory)


@pytest.mark.parametrize("manifest", ["by tensor", "by file"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_flipped_byte_never_ends_in_a_new_checkpoint(models: dict[str, Path], manifest: str, threads: int) -> None:
    out = models["hf"].with_name("out")
    for source, convert, tensor in (
        (models["hf"], hf_to_megatron.convert, f"tensor '{VICTIM}'"),
        (models["megatron"], megatron_to_hf.convert, "decoder.layers.mlp.linear_fc1.weight"),
    ):
        if manifest == "by file":
            forget_segments(source)
        path, position = place_of(source, VICTIM)
        assert "promises" in convert(source, out, threads=threads, overwrite=True)
        flip(path, position)
        with pytest.raises(ValueError, match="does not have the bytes that the manifest promises") as error:
            convert(source, out.with_name("damaged"), threads=threads)
        assert path.name in str(error.value) and (manifest == "by file" or tensor in str(error.value))
        assert not out.with_name("damaged").exists()
        flip(path, position)
        convert(source, out, threads=threads, overwrite=True)


@pytest.mark.parametrize("where", ["before the numbers", "after the numbers", "another file"])
def test_other_bytes_of_a_checkpoint_are_checked_too(models: dict[str, Path], where: str) -> None:
    root = models["megatron"]
    name = "__0_0.distcp"
    start = max(p.offset for p in read_metadata(root).storage_data.values() if p.relative_path == name)
    if where == "before the numbers":
        flip(root / name, start + 12)
    elif where == "after the numbers":
        flip(root / name, (root / name).stat().st_size - 30)
    else:
        flip(root / "hf" / "config.json", 3)
    with pytest.raises(ValueError):
        megatron_to_hf.convert(root, root.with_name("out"))


def test_a_manifest_that_does_not_know_a_tensor_is_an_error(models: dict[str, Path]) -> None:
    manifest = json.loads((models["hf"] / MANIFEST).read_text())
    del manifest["tensors"][VICTIM]
    (models["hf"] / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"does not list tensor '{VICTIM}'"):
        hf_to_megatron.convert(models["hf"], models["hf"].with_name("out"))


def test_a_single_file_wins_over_a_stale_index_as_in_transformers(tmp_path: Path) -> None:
    old = load_file(write_model(tmp_path / "model", seed=1) / "model.safetensors")
    save_file(old, tmp_path / "model" / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    write_model(tmp_path / "model", seed=2)  # saved again, as one file
    hf_to_megatron.convert(tmp_path / "model", tmp_path / "megatron")
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    new = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(t, new[n]) for n, t in load_file(tmp_path / "back" / "model.safetensors").items())


def spoil(directory: Path, number: float) -> None:
    state = load_file(directory / "model.safetensors")
    state[VICTIM][3, 5] = number
    save_file(state, directory / "model.safetensors")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_counted_and_refused_on_request(tmp_path: Path, number: float) -> None:
    source = write_model(tmp_path / "source")
    assert "all numbers are finite" in hf_to_megatron.convert(source, tmp_path / "clean", check_finite=True)
    spoil(source, number)
    report = hf_to_megatron.convert(source, tmp_path / "megatron")
    assert f"1 numbers are NaN or infinite, 1 of them in {VICTIM}" in report
    assert VICTIM in megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "hf")
    for convert, root in ((hf_to_megatron.convert, source), (megatron_to_hf.convert, tmp_path / "megatron")):
        with pytest.raises(ValueError, match=f"1 numbers of {VICTIM} are NaN or infinite"):
            convert(root, tmp_path / "refused", check_finite=True)
    assert not (tmp_path / "refused").exists()


def run_verify(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["verify", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.run(verify.main)
    return int(ended.value.code or 0)


def test_verify_fails_for_nan_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "source")
    spoil(source, float("nan"))
    hf_to_megatron.convert(source, tmp_path / "megatron")
    assert compare(open_source(source), open_source(tmp_path / "megatron")).different == 0
    assert run_verify(monkeypatch, source, tmp_path / "megatron", "--no-logits") == 1
    assert run_verify(monkeypatch, source) == 1


def change_config(directory: Path, **changes: object) -> Path:
    (directory / "config.json").write_text(json.dumps({**RAW, **changes}))
    return directory


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": 1e6}, "rope: Rope(theta=10000.0"),
        ({"rms_norm_eps": 1e-5}, "norm_eps: 1e-06 against 1e-05"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "window: None against 8"),
        ({"max_position_embeddings": 64}, "max_positions: 32768 against 64"),
    ],
)
def test_verify_says_what_differs_in_a_configuration(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    words: str,
) -> None:
    a, b = write_model(tmp_path / "a"), change_config(write_model(tmp_path / "b"), **changes)
    assert run_verify(monkeypatch, a, b, "--no-logits", "--threads", 2) == 1
    out = capsys.readouterr().out
    assert f"config.json differs in {words}" in out and "equal bit for bit" in out


def test_what_changes_no_result_is_mentioned_and_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_model(tmp_path / "a"), change_config(write_model(tmp_path / "b"), use_cache=False, rope_theta=1e4)
    assert run_verify(monkeypatch, a, b, "--no-logits") == 0
    assert "without consequence in: use_cache" in capsys.readouterr().out
    ours, theirs = (conversion.parse_config({**RAW, "eos_token_id": token}) for token in (1, 2))
    assert config_differences(ours, theirs)[0] == ["eos_token_id: 1 against 2"]


@pytest.mark.parametrize("threads", [1, 2])
def test_verify_reads_blocks_and_never_a_whole_tensor(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(verify, "BLOCK_BYTES", 256)
    a, b = open_source(models["hf"]), open_source(models["megatron"])
    largest = 0
    rows = a.rows

    def watched(name: str, start: int, stop: int) -> torch.Tensor:
        nonlocal largest
        block = rows(name, start, stop)
        largest = max(largest, 4 * block.numel())
        return block

    monkeypatch.setattr(a, "rows", watched)
    assert compare(a, b, threads).equal and largest == 1024  # a KV head of 16 rows of 16, never less


def test_the_exported_config_names_the_dtype_of_the_weights(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    save_file({n: t.float() for n, t in load_file(source / "model.safetensors").items()}, source / "model.safetensors")
    hf_to_megatron.convert(source, tmp_path / "megatron")  # its config.json says bfloat16
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == {**RAW, "torch_dtype": "float32"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_that_overflows_is_an_error(tmp_path: Path, dtype: torch.dtype) -> None:
    source = write_model(tmp_path / "source")
    state = {n: t.float() for n, t in load_file(source / "model.safetensors").items()}
    state[VICTIM][0, 0] = 3.4e38
    save_file(state, source / "model.safetensors")
    hf_to_megatron.convert(source, tmp_path / "wide")
    for convert, root in ((hf_to_megatron.convert, source), (megatron_to_hf.convert, tmp_path / "wide")):
        with pytest.raises(ValueError, match=f"1 numbers of {re.escape(VICTIM)} overflow in {dtype}"):
            convert(root, tmp_path / "narrow", dtype=dtype)
    assert not (tmp_path / "narrow").exists()


@pytest.mark.parametrize(
    ("numbers", "count"),
    [
        (torch.tensor([3e38, 3e38, 1.0]), 0),  # the sum overflows, every number is finite
        (torch.tensor([float("inf"), -float("inf"), 1.0]), 2),
        (torch.full((3,), 60000.0).half(), 0),
        (torch.tensor([1e300, float("nan")], dtype=torch.float64), 1),
        (torch.empty(0), 0),
        (torch.empty(0).bfloat16(), 0),
        (torch.tensor([-3e38, 3e38, -0.0]).bfloat16(), 0),
        (torch.tensor([1.0, -float("inf"), -float("nan")]).bfloat16(), 2),
        (torch.tensor([float("inf"), 65504.0]).half(), 1),
        (torch.tensor([[1.0, 2.0], [-float("inf"), 3.0]]).half().t(), 1),
    ],
)
def test_counting_is_exact_where_the_sum_is_not_finite(numbers: torch.Tensor, count: int) -> None:
    values = Values()
    values.cast("x", numbers, numbers.dtype)
    assert values.nonfinite.total() == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_classified_as_torch_does(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    assert [count_nonfinite(number) for number in numbers.split(1)] == (~numbers.isfinite()).long().tolist()


COMMANDS: dict[str, Callable[[], int]] = {"in": hf_to_megatron.main, "out": megatron_to_hf.main}


@pytest.mark.parametrize("direction", COMMANDS)
def test_the_commands_report_what_they_found(
    models: dict[str, Path], direction: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ("--hf", models["hf"]) if direction == "in" else ("--megatron", models["megatron"])
    words = [*source, "--out", models["hf"].with_name("out"), "--check-finite", "--threads", 2]
    monkeypatch.setattr("sys.argv", ["x", *map(str, words)])
    assert COMMANDS[direction]() == 0
    assert "what the source's manifest promises; all numbers are finite" in capsys.readouterr().out
