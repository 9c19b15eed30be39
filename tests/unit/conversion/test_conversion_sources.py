"""Every source is recognised, or refused with one sentence that identifies it and gives the fix."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoint import QWEN2, write_random

import conversion
from conversion import cli, hf_to_megatron
from conversion.families import FAMILIES
from conversion.locate import locate
from conversion.publish import TRACKER

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "truncate": True}
FULL: dict[str, Any] = {
    **QWEN2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "rope_scaling": YARN,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": 8,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "partial_rotary_factor": 1.0,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.0,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qkv_bias": False,
    "bias": False,
    "torch_dtype": "bfloat16",
    "rotary_dim": 2,
    "use_bias": False,
    "mlp_layer_types": ["dense", "sparse"],
    "attn_type_list": [1, 1],
    "query_pre_attn_scalar": 4,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 2,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(sorted(FULL)), JSON, min_size=1, max_size=2))
def test_any_config_is_read_or_refused_in_one_sentence(family: str, changes: dict[str, Any]) -> None:
    config = {**copy.deepcopy(FULL), "architectures": [family], **changes}
    if FAMILIES[family].local_theta is not None:
        config["rope_parameters"] = {"full_attention": config["rope_parameters"]}
    try:
        hf = conversion.parse_config(config)
    except ValueError as error:
        text = str(error)
        assert "\n" not in text and 10 < len(text) < 400
        assert any(key in text for key in config) or "rope" in text or "architecture" in text
    else:
        assert hf.num_layers <= 10_000 and conversion.transformer_config(hf) and conversion.gpt_model_kwargs(hf)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["rope_scaling", "rope_parameters"]), st.dictionaries(st.sampled_from(sorted(YARN)), JSON))
def test_any_rope_parameters_are_read_or_refused(key: str, changes: dict[str, Any]) -> None:
    config = {**QWEN2, key: {**YARN, **changes}}
    try:
        conversion.parse_config(config)
    except ValueError as error:
        assert "\n" not in str(error)


@given(st.sampled_from(["architectures"]), JSON)
def test_any_architecture_is_refused_or_known(key: str, value: Any) -> None:
    try:
        conversion.parse_config({**QWEN2, key: value})
    except ValueError as error:
        assert "architecture" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{", '{"architectures": ', "[" * 100_000, "\xff", "", "NaN"])
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="config.json") as error:
        conversion.read_config(tmp_path)
    assert len(str(error.value)) < 500


def model(directory: Path) -> Path:
    return write_random(directory, QWEN2)


def run(command: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", [command, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.run(importlib.import_module(f"conversion.{command}").main)
    return int(ended.value.code or 0)


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def make_pointer_weights(root: Path) -> Path:
    lfs_pointer(model(root / "x") / "model.safetensors")
    return root / "x"


def make_pointer_tokenizer(root: Path) -> Path:
    lfs_pointer(model(root / "x") / "tokenizer.json")
    return root / "x"


def make_pointer_config(root: Path) -> Path:
    lfs_pointer(model(root / "x") / "config.json")
    return root / "x"


def make_legacy(root: Path) -> Path:
    (root / "x" / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    (root / "x" / TRACKER).write_text("5\n")
    return root / "x"


def make_legacy_step(root: Path) -> Path:
    return make_legacy(root) / "iter_0000005"


def make_root_without_tracker(root: Path) -> Path:
    (root / "x" / "iter_0000005").mkdir(parents=True)
    return root / "x"


def make_torn_tracker(root: Path) -> Path:
    make_root_without_tracker(root)
    (root / "x" / TRACKER).write_text("")
    return root / "x"


def make_tracker_of_nothing(root: Path) -> Path:
    make_root_without_tracker(root)
    (root / "x" / TRACKER).write_text("7")
    return root / "x"


def make_empty(root: Path) -> Path:
    (root / "x").mkdir()
    return root / "x"


def make_with(name: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        make_empty(root)
        (root / "x" / name).write_text("{}")
        return root / "x"

    return make


UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "weights are git-lfs pointers": (make_pointer_weights, "git lfs pull"),
    "the tokenizer is a git-lfs pointer": (make_pointer_tokenizer, "git lfs pull"),
    "config.json is a git-lfs pointer": (make_pointer_config, "git lfs pull"),
    "legacy root": (make_legacy, "legacy format"),
    "legacy step": (make_legacy_step, "legacy format"),
    "root without tracker": (make_root_without_tracker, "name one of them"),
    "torn tracker": (make_torn_tracker, "neither a step nor 'release'"),
    "tracker of a missing step": (make_tracker_of_nothing, "iter_0000007, which is not there"),
    "empty": (make_empty, "neither config.json"),
    "hub id": (lambda root: Path("Qwen/Qwen2.5-7B"), "hf download Qwen/Qwen2.5-7B"),
    "missing": (lambda root: root / "no", "does not exist"),
    "a file": (lambda root: model(root / "x") / "model.safetensors", "give the directory"),
    "adapter": (make_with("adapter_config.json"), "adapter without its base model"),
    "gguf": (make_with("model.gguf"), "GGUF"),
    "torch_dcp": (make_with(".metadata"), "torch_dcp"),
    "another metadata.json": (make_with("metadata.json"), "metadata.json is not valid checkpoint metadata"),
    "config.json alone": (make_with("config.json"), "architecture None is not supported"),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("command", ["hf_to_megatron", "megatron_to_hf", "verify", "inspect"])
def test_what_cannot_be_read_is_named_with_what_to_do(
    case: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = UNREADABLE[case]
    source, out = make(tmp_path), tmp_path / "out"
    arguments: list[object] = {
        "hf_to_megatron": ["--hf", source, "--out", out],
        "megatron_to_hf": ["--megatron", source, "--out", out],
        "verify": [source, "--no-logits"],
        "inspect": [source],
    }[command]
    status, printed = run(command, monkeypatch, *arguments), capsys.readouterr().err
    if "tokenizer" in case and command in ("verify", "inspect"):
        assert status == 0  # the weights exist
        return
    assert status == 1 and printed.startswith("error: ") and printed.count("\n") == 1 and not out.exists()
    other_direction = command == "megatron_to_hf" and (tmp_path / "x" / "config.json").is_file() and case != "a file"
    other_direction |= command == "hf_to_megatron" and case == "another metadata.json"
    assert ("use conversion." if other_direction else words) in printed


def test_the_directions_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_to_megatron.convert(model(tmp_path / "hf"), tmp_path / "megatron")
    assert run("hf_to_megatron", monkeypatch, "--hf", tmp_path / "megatron", "--out", tmp_path / "x") == 1
    assert "is a Megatron checkpoint: use conversion.megatron_to_hf" in capsys.readouterr().err
    assert locate(tmp_path / "hf").kind == "Hugging Face" and locate(tmp_path / "megatron").kind == "Megatron"


@pytest.mark.parametrize("threads", ["0", "-1", "two", "1.5", "²"])
def test_threads_must_be_positive(
    threads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--hf", tmp_path, "--out", tmp_path / "out", "--threads", threads]
    assert run("hf_to_megatron", monkeypatch, *words) == 2
    assert "not a whole number of at least 1" in capsys.readouterr().err
