"""Megatron-Bridge for architectures without a table: a stand-in with the API of its 0.3.1, which needs CUDA itself."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import cli
from conversion.publish import check_manifest

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


class AutoBridge:
    """Signatures of `megatron.bridge.AutoBridge`; writes the same files: iter_0000000 and a tracker file."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    fail: ClassVar[str] = ""

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, **kwargs: Any) -> AutoBridge:
        cls.calls.append(("from_hf_pretrained", kwargs))
        return cls()

    @classmethod
    def import_ckpt(cls, hf_model_id: str | Path, megatron_path: str | Path, **kwargs: Any) -> None:
        cls.calls.append(("import_ckpt", kwargs))
        if cls.fail:
            raise RuntimeError(cls.fail)
        root = Path(megatron_path)
        (root / "iter_0000000").mkdir(parents=True)
        (root / "iter_0000000" / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
        (root / "latest_checkpointed_iteration.txt").write_text("0")

    def export_ckpt(
        self,
        megatron_path: str | Path,
        hf_path: str | Path,
        show_progress: bool = True,
        strict: bool = False,
        source_path: str | Path | None = None,
    ) -> None:
        self.calls.append(("export_ckpt", {"strict": strict}))
        Path(hf_path).mkdir(exist_ok=True)
        (Path(hf_path) / "modeling_foo.py").write_text("import os")
        save_file({"w": torch.ones(2)}, Path(hf_path) / "model.safetensors")


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    """A model of an architecture that has no table."""
    directory = tmp_path / "foo"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**RAW, "architectures": ["FooForCausalLM"]}))
    (directory / "tokenizer.json").write_text("{}")
    save_file({"w": torch.ones(2)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> type[AutoBridge]:
    monkeypatch.setitem(sys.modules, "megatron.bridge", SimpleNamespace(AutoBridge=AutoBridge, __version__="0.3.1"))
    monkeypatch.setattr(AutoBridge, "calls", [])
    monkeypatch.setattr(AutoBridge, "fail", "")
    return AutoBridge


def run(monkeypatch: pytest.MonkeyPatch, command: str, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", [command, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.run(importlib.import_module(f"conversion.{command}").main)
    return int(ended.value.code or 0)


def test_an_architecture_without_a_table_is_converted_both_ways(
    unknown: Path, tmp_path: Path, installed: type[AutoBridge], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, back = tmp_path / "megatron", tmp_path / "back"
    assert run(monkeypatch, "hf_to_megatron", "--hf", unknown, "--out", out, "--dtype", "bfloat16") == 0
    assert "converted by Megatron-Bridge 0.3.1, because there is no table here" in capsys.readouterr().out
    manifest = check_manifest(out, contents=True)
    assert manifest and manifest["converted_by"] == "Megatron-Bridge 0.3.1" and manifest["base_model"] == "foo"
    assert (out / "iter_0000000" / "hf" / "tokenizer.json").is_file()
    assert run(monkeypatch, "megatron_to_hf", "--megatron", out, "--out", back) == 0
    assert load_file(back / "model.safetensors")["w"].tolist() == [1, 1] and not list(back.glob("*.py"))
    assert check_manifest(back, contents=True)
    assert installed.calls == [
        ("import_ckpt", {"trust_remote_code": False, "torch_dtype": torch.bfloat16}),
        ("from_hf_pretrained", {"trust_remote_code": False}),
        ("export_ckpt", {"strict": True}),
    ]


def test_known_architectures_and_backend_own_never_reach_it(
    unknown: Path, tmp_path: Path, installed: type[AutoBridge], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (unknown / "config.json").write_text(json.dumps(RAW))
    assert run(monkeypatch, "hf_to_megatron", "--hf", unknown, "--out", tmp_path / "out") == 1
    assert "lacks the tensors" in capsys.readouterr().err
    (unknown / "config.json").write_text(json.dumps({**RAW, "architectures": ["FooForCausalLM"]}))
    assert run(monkeypatch, "hf_to_megatron", "--hf", unknown, "--out", tmp_path / "out", "--backend", "own") == 1
    assert "'FooForCausalLM' is not supported" in capsys.readouterr().err
    assert installed.calls == []


def test_an_error_of_it_is_one_sentence_and_leaves_nothing(
    unknown: Path, tmp_path: Path, installed: type[AutoBridge], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(installed, "fail", "no CUDA\n  here")
    assert run(monkeypatch, "hf_to_megatron", "--hf", unknown, "--out", tmp_path / "out") == 1
    assert capsys.readouterr().err == "error: Megatron-Bridge 0.3.1 failed: no CUDA here\n"
    words = ("--resume", "--check-finite")
    assert run(monkeypatch, "hf_to_megatron", "--hf", unknown, "--out", tmp_path / "out", *words) == 1
    assert "--resume, --check-finite: not with Megatron-Bridge" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["foo"]


def test_without_the_package_the_sentence_says_what_to_install(
    unknown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    assert run(monkeypatch, "hf_to_megatron", "--hf", unknown, "--out", tmp_path / "out") == 1
    assert "'FooForCausalLM' is not supported" in capsys.readouterr().err
    words = ("--hf", unknown, "--out", tmp_path / "out", "--backend", "megatron-bridge")
    assert run(monkeypatch, "hf_to_megatron", *words) == 1
    assert "install megatron-bridge with Transformer Engine" in capsys.readouterr().err


def test_the_stand_in_has_the_signatures_of_the_package() -> None:
    try:
        real = importlib.import_module("megatron.bridge").AutoBridge
    except ImportError as error:
        pytest.skip(f"Megatron-Bridge cannot be imported: {error}")
    for name in ("from_hf_pretrained", "import_ckpt", "export_ckpt"):
        mine, theirs = (list(inspect.signature(getattr(cls, name)).parameters) for cls in (AutoBridge, real))
        assert mine == theirs
