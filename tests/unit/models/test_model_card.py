"""A model card names the training run's settings, but no directory of its machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoint import write_random

from configs.load import load_config, save_config
from conversion import hf_to_megatron
from recipes import checkpoint
from recipes.models.card import COMMAND, export_card, save_command

RAW = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "torch_dtype": "float32",
}


def test_the_card_of_a_run_has_names_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["recipe=quickstart", "data.path=/secret/place/math.jsonl", "data.eval_path=[/a/b/x.jsonl,/a/y.jsonl]"]
    monkeypatch.setattr("sys.argv", ["train.py", *words, "model.path=/models/Base-7B", "optim.lr=1e-6"])
    save_command(tmp_path)
    config = load_config(["recipe=quickstart", "data.name=jsonl", *words[1:], "model.path=/models/Base-7B"])
    card = export_card(config, 7, tmp_path)
    assert (card["base_model"], card["data"], card["step"]) == ("Base-7B", "math.jsonl", 7)
    assert "loss ce_gppo" in card["method"] and "advantages grpo" in card["method"]
    assert "data.path=math.jsonl" in card["command"] and "x.jsonl,y.jsonl" in card["command"]
    assert "optim.lr=1e-6" in card["command"] and "/" not in card["command"]


def test_a_checkpoint_is_exported_with_the_options_and_the_card_of_the_final_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    write_random(source, RAW)
    hf_to_megatron.convert(source, run / "checkpoints" / "step_000003")
    save_config(load_config(["recipe=quickstart", "model.path=smollm2"]), run / "config.yaml")
    (run / COMMAND).write_text("python -m recipes.train recipe=quickstart\n")
    out = tmp_path / "out"
    assert checkpoint.main([str(run), "--export", str(out), "--dtype", "bfloat16", "--threads", "1"]) == 0
    readme = (out / "README.md").read_text()
    for line in (
        "Base model: SmolLM2-135M-Instruct",
        "Recipe: quickstart",
        "Step: 3",
        "recipes.train recipe=quickstart",
    ):
        assert line in readme
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert checkpoint.main([str(run), "--export", str(out)]) == 2
    advice = capsys.readouterr().err
    assert "--overwrite" in advice
    assert checkpoint.main([str(run), "--export", str(out), "--overwrite", "--config-dialect", "5"]) == 0
    assert "rope_parameters" in json.loads((out / "config.json").read_text())
