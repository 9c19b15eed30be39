"""From a command line to a call of `train`: help, refusals as one sentence, relaunch, model paths."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.layout import learner_processes
from configs.load import GROUPS, choices
from configs.schema import Config
from recipes import launch as module
from recipes.checks.settings import load_checked
from recipes.launch import launch
from recipes.models.locate import model_location
from recipes.models.prepare import make_tiny_model

Calls = list[tuple[Config, Path]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=0)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def status(argv: list[str]) -> tuple[int, Calls]:
    calls: Calls = []
    return launch(lambda config, directory: calls.append((config, directory)), argv), calls


def test_help_names_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        assert status(["loss=nonsense", flag]) == (0, [])
        text = capsys.readouterr().out
        papers = [name for name in choices("recipe") if "/" in name]
        named = [name for group in GROUPS for name in choices(group) if name not in papers]
        assert [name for name in named if name not in text] == []
        assert "run.dir=DIR" in text and "rollout.replay=DIR" in text
        assert max(map(len, text.splitlines())) <= 120


def test_train_is_called_with_the_configuration(model: Path) -> None:
    code, calls = status([f"model.path={model}", "optim.lr=1e-6"])
    assert code == 0 and [(c.optim.lr, d) for c, d in calls] == [(1e-6, model)]


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["optim.lrr=1"], "there is no key 'optim.lrr' (did you mean 'optim.lr'?)"),
        (["loss=cegppo"], "loss=cegppo is unknown (did you mean 'ce_gppo'?)"),
        (["parallel.tp=3"], "parallel.tp=3 does not divide the model's 4 attention heads"),
        (["parallel.ep=2"], "parallel.ep=2: the model has no experts"),
        (["parallel.pp=3"], "parallel.pp=3 x parallel.vpp=1 does not divide the model's 2 layers"),
        (["rollout.max_model_len=4096"], "rollout.max_model_len=4096 exceeds the model's 1024 positions"),
        (["reward.params.nonsense=1"], "nonsense"),
    ],
)
def test_user_errors_are_one_line_and_status_2(
    model: Path, capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    assert status([f"model.path={model}", *argv]) == (2, [])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error, error


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 17, "qk_rope_head_dim": 8, "n_group": 1, "first_k_dense_replace": 1}


@pytest.mark.parametrize(
    "architecture, changes, argv, sentence",
    [
        ("Qwen3MoeForCausalLM", MIXTURE, ["parallel.ep=3"], "parallel.ep=3 does not divide the model's 4 experts"),
        ("Qwen3MoeForCausalLM", MIXTURE, ["parallel.tp=2"], "needs sequence parallelism: parallel.sp=true"),
        ("DeepseekV3ForCausalLM", LATENT, ["parallel.tp=2", "parallel.sp=true"], "does not divide the 25 channels"),
        ("LlamaForCausalLM", {"quantization_config": {"quant_method": "fp8"}}, [], "make a plain copy with conversion"),
        ("LlamaForCausalLM", {"num_attention_heads": 6, "num_key_value_heads": 2}, ["parallel.tp=3"], "multiple of"),
    ],
)
def test_a_layout_or_length_that_the_model_does_not_allow(
    model: Path, tmp_path: Path, architecture: str, changes: dict[str, Any], argv: list[str], sentence: str
) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": [architecture], "hidden_size": 96, "intermediate_size": 96, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence):
        module.check_model(load_checked([f"model.path={tmp_path}", *argv]), tmp_path)


def test_a_reference_of_another_model_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    words = [f"model.path={model}", "reference.kl_coef=0.1", f"reference.path={tmp_path}"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    assert status(words) == (2, [])
    assert f"reference.path={tmp_path} is another model than the policy" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    assert status(words)[0] == 0


def test_errors_of_the_run(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails_with(error: BaseException) -> int:
        def train(config: Config, directory: Path) -> None:
            raise error

        return launch(train, [f"model.path={model}"])

    assert fails_with(ValueError("seed=x: choose a number")) == 2
    assert capsys.readouterr().err == "error: seed=x: choose a number\n"
    assert fails_with(KeyboardInterrupt()) == 130
    assert "start again with the same run.dir" in capsys.readouterr().err
    with pytest.raises(RuntimeError):  # not a user error: keep the traceback
        fails_with(RuntimeError("a bug"))


def test_dry_run_trains_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, calls = status(["run.dry_run=true", f"model.cache_dir={tmp_path / 'cache'}"])
    assert (code, calls) == (0, []) and "optim" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists(), "no model is made for a plan"


def test_several_processes_are_started_by_torchrun(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Replaced(BaseException):
        """Raised by the patched os.execv, which does not return."""

    seen: list[list[str]] = []

    def execv(path: str, words: list[str]) -> None:
        assert path == sys.executable
        seen.append(words)
        raise Replaced

    monkeypatch.setattr(os, "execv", execv)
    argv = [f"model.path={model}", "parallel.tp=2", "parallel.nproc=4"]
    with pytest.raises(Replaced):
        status(argv)
    (words,) = seen
    assert Path(words[3]).name == "foreground.py"
    assert words[5:7] == ["-m", "torch.distributed.run"] and words[words.index("--nproc-per-node") + 1] == "4"
    assert words[-5:] == ["-m", "recipes.train", *argv]

    monkeypatch.setenv("WORLD_SIZE", "4")  # now as a child of torchrun
    monkeypatch.setenv("RANK", "3")
    code, calls = status(argv)
    assert code == 0 and len(calls) == 1


@pytest.mark.parametrize("world", ["2", "3"])
def test_a_launcher_with_another_number_of_processes(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], world: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    argv = [f"model.path={model}", "parallel.tp=2", "parallel.nproc=4"]
    assert status(argv) == (2, [])
    assert f"{world} processes were started" in capsys.readouterr().err


def test_number_of_processes() -> None:
    config = load_checked(["parallel.tp=2", "parallel.pp=3"])
    assert learner_processes(config) == 6
    config.parallel.nproc = 12
    assert learner_processes(config) == 12


def test_model_locations(tmp_path: Path, model: Path) -> None:
    def at(*words: str) -> Path:
        return model_location(load_checked([f"model.cache_dir={tmp_path}", *words]))

    assert at(f"model.path={model}") == model
    assert at("model.path=smollm2") == tmp_path / "SmolLM2-135M-Instruct"
    tiny = at()
    assert tiny.parent == tmp_path and tiny == at("optim.lr=1e-3"), "the policy's start does not depend on training"
    others = {at("model.warm_start.seed=1"), at("model.warm_start.lr=1e-3"), at("model.warm_start.max_steps=7")}
    assert len(others | {tiny}) == 4, "another warm start is another model"


def test_only_the_first_rank_makes_the_model(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    made: list[str] = []
    monkeypatch.setattr(module, "prepare_model", lambda config, directory: made.append(os.environ["RANK"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        status([f"model.path={model}"])
    assert made == ["0"]
