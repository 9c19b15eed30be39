"""Storage of tensors: in torch.save's format, read by rows, and with checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import QWEN2, write_random
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

import conversion
from conversion import hf_to_megatron, megatron_to_hf, megatron_writer
from conversion.digests import BULK, SMALL
from conversion.megatron_keys import find_slots
from conversion.megatron_reader import MegatronReader, read_metadata
from conversion.publish import MANIFEST, ManifestError, check_manifest
from conversion.sources import open_source
from conversion.stored_pieces import PieceReader
from conversion.verify import scan

RAW = {**QWEN2, "tie_word_embeddings": False}


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    return write_random(tmp_path / "source", RAW, torch.bfloat16)


def test_every_stored_piece_is_byte_for_byte_what_torch_saves(hf_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "megatron"
    hf_to_megatron.convert(hf_dir, out, threads=2)
    state = load_file(hf_dir / "model.safetensors")
    places = read_metadata(out).storage_data
    name = "decoder.layers.self_attention.linear_proj.weight"
    place = places[MetadataIndex(name, torch.Size((1, 0, 0)))]
    stored = (out / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
    expected = io.BytesIO()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state["model.layers.1.self_attn.o_proj.weight"][None], expected)
    finally:
        torch.serialization.set_crc32_options(True)
    assert stored == expected.getvalue()
    assert sum(info.length for info in places.values()) == sum(path.stat().st_size for path in out.glob("*.distcp"))


class _Directory:
    """Pieces of one tensor "t", saved as by another tool."""

    def __init__(self, root: Path) -> None:
        self.root, self.places = root, {}

    def add(self, saved: object, offsets: tuple[int, ...]) -> None:
        file = self.root / f"{len(self.places)}.distcp"
        buffer = io.BytesIO(b"before")
        buffer.seek(6)
        torch.save(saved, buffer)
        file.write_bytes(buffer.getvalue() + b"after")
        length = len(buffer.getvalue()) - 6
        self.places[MetadataIndex("t", torch.Size(offsets))] = _StorageInfo(file.name, 6, length)

    def reader(self) -> PieceReader:
        return PieceReader(self.root, Metadata({}, storage_data=self.places))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "slice of a larger storage"])
@pytest.mark.parametrize("known", [False, True])
def test_rows_of_a_piece_are_read_whatever_its_strides(tmp_path: Path, layout: str, known: bool) -> None:
    numbers = torch.randn(2, 6, 4)
    saved = {
        "contiguous": numbers,
        "transposed": numbers.transpose(1, 2).contiguous().transpose(1, 2),
        "slice of a larger storage": torch.cat([torch.zeros(1, 6, 4), numbers])[1:],
    }[layout]
    directory = _Directory(tmp_path)
    directory.add(saved, (0, 3, 0))
    directory.add(saved + 1, (0, 9, 0))  # has the same beginning as the first
    reader, target = directory.reader(), torch.zeros(3, 5)
    if known:
        first = ChunkStorageMetadata(torch.Size((0, 3, 0)), torch.Size((2, 6, 4)))
        reader.read("t", first, [0], 0, torch.empty(1, 4))
    piece = ChunkStorageMetadata(torch.Size((0, 9, 0)), torch.Size((2, 6, 4)))
    reader.read("t", piece, [1], 2, target[:, 1:])
    assert torch.equal(target[:, 1:], numbers[1, 2:5] + 1) and not target[:, 0].any()


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("conversion ran this",)


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (torch.zeros(6, 5), r"\(6, 5\) instead of torch.float32 \(6, 4\)"),
        (torch.zeros(6, 4, dtype=torch.float16), "torch.float16"),
        ({"not": "a tensor"}, "not a tensor"),
        (Evil(), "damaged"),
    ],
)
def test_a_piece_that_is_not_what_the_index_says_is_refused(
    tmp_path: Path, saved: object, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = _Directory(tmp_path)
    directory.add(saved, (0, 0))
    piece = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((6, 4)))
    with pytest.raises(ValueError, match=words):
        directory.reader().read("t", piece, [], 0, torch.empty(6, 4))
    assert "conversion ran this" not in capsys.readouterr().out


def test_a_file_cut_behind_the_index_is_noticed(hf_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "megatron"
    hf_to_megatron.convert(hf_dir, out)
    (out / MANIFEST).unlink()
    path = out / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-2000])
    reader = MegatronReader(out)
    with pytest.raises(ValueError, match="a stored piece of .* is damaged"):
        for name in reader.names():
            list(reader.blocks(name))


def test_large_files_have_a_fast_checksum_and_small_ones_sha256(hf_dir: Path, tmp_path: Path) -> None:
    hf_to_megatron.convert(hf_dir, tmp_path / "megatron", threads=2)
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "hf")
    manifest = json.loads((tmp_path / "megatron" / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        digests = entry["segments"].values() if name.endswith(".distcp") else [entry["digest"]]
        assert all(d.startswith(f"{BULK if name.endswith('.distcp') else SMALL}:") for d in digests), name
    config = (tmp_path / "megatron" / "hf" / "config.json").read_bytes()
    assert manifest["files"]["hf/config.json"]["digest"] == "sha256:" + hashlib.sha256(config).hexdigest()
    scan(open_source(tmp_path / "hf"))
    path = tmp_path / "hf" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="does not have the bytes that the manifest promises"):
        scan(open_source(tmp_path / "hf"))


def test_manifests_of_the_first_format_are_still_read(hf_dir: Path) -> None:
    def write(directory: Path, tensor_digest: str) -> None:
        config = (directory / "config.json").read_bytes()
        files = {
            "config.json": {"size": len(config), "sha256": hashlib.sha256(config).hexdigest()},
            "model.safetensors": {"size": (directory / "model.safetensors").stat().st_size},
        }
        manifest = {"format": 1, "files": files, "tensors": {**digests, "lm_head.weight": tensor_digest}}
        (directory / MANIFEST).write_text(json.dumps(manifest))

    state = load_file(hf_dir / "model.safetensors")
    digests = {n: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for n, t in state.items()}
    write(hf_dir, digests["lm_head.weight"])
    scan(open_source(hf_dir))
    write(hf_dir, digests["model.norm.weight"])
    with pytest.raises(ValueError, match="'lm_head.weight' .* does not have the bytes"):
        scan(open_source(hf_dir))
    (hf_dir / "config.json").write_text(json.dumps(RAW).replace("37", "38"))
    with pytest.raises(ManifestError, match="config.json does not have the bytes"):
        check_manifest(hf_dir, contents=True)


@pytest.mark.parametrize("digest", ["md5:00", "sha256", 7, None])
def test_an_unknown_checksum_is_an_error_not_a_pass(tmp_path: Path, digest: object) -> None:
    (tmp_path / "file").write_text("x")
    manifest = {"format": 2, "files": {"file": {"size": 1, "digest": digest}}}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ManifestError):
        check_manifest(tmp_path, contents=True)


def test_memory_does_not_follow_the_size_of_a_piece(hf_dir: Path, tmp_path: Path) -> None:
    """Pieces of any size that Megatron stored are read in blocks of rows."""
    assert megatron_writer.BLOCK_BYTES < megatron_writer.STORED_BYTES
    hf_to_megatron.convert(hf_dir, tmp_path / "megatron")
    reader = MegatronReader(tmp_path / "megatron")
    name = "embedding.word_embeddings.weight"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conversion.megatron_reader.BLOCK_BYTES", 160)  # 5 rows of 16 bfloat16
        blocks = list(reader.blocks(name))
    assert [start for start, _ in blocks] == list(range(0, 37, 5)) and len(blocks[-1][1]) == 2
    expected = load_file(hf_dir / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(torch.cat([block for _, block in blocks]), expected)


def numbered(names: list[str]) -> list[str]:
    return [conversion.te_name(name) for name in names]


def test_a_checkpoint_with_numbered_layers_and_extra_states_is_found() -> None:
    hf = conversion.parse_config(RAW)
    keys = numbered(conversion.megatron_names(hf))
    states = ["decoder.layers.0.self_attention.linear_qkv._extra_state", "decoder.final_layernorm._extra_state"]
    others = ["optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc1.weight", "rng_state/shard_0.0_1.1"]
    slots = find_slots(hf, [*keys, *states, *others])
    assert {name: slot.key for name, slot in slots.items()} == dict(
        zip(conversion.megatron_names(hf), keys, strict=True)
    )


def test_halves_of_gated_projections_are_refused_by_name() -> None:
    hf = conversion.parse_config(RAW)
    keys = numbered(conversion.megatron_names(hf))
    split = [half for key in keys for half in ([key + "_w", key + "_v"] if "linear_fc1.weight" in key else [key])]
    with pytest.raises(ValueError, match=r"apart \(decoder.layers.0.mlp.linear_fc1.weight_v, .*singleton_local_shards"):
        find_slots(hf, split)


def test_eight_bit_weights_are_refused(hf_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "megatron"
    hf_to_megatron.convert(hf_dir, out)
    (out / MANIFEST).unlink()
    metadata = read_metadata(out)
    key = "decoder.layers.mlp.linear_fc1.weight"
    properties = dataclasses.replace(metadata.state_dict_metadata[key].properties, dtype=torch.float8_e4m3fn)
    metadata.state_dict_metadata[key] = dataclasses.replace(metadata.state_dict_metadata[key], properties=properties)
    (out / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="linear_fc1.weight is stored as torch.float8_e4m3fn"):
        MegatronReader(out)
