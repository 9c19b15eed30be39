"""The models of the end-to-end tests: the quick start's, and a random Qwen2 with a byte-pair tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

EOS, PAD = "<eos>", "<pad>"


def make_qwen2(path: Path, *, vocab_size: int = 96) -> Path:
    """Write a Hugging Face model directory: 2 layers, hidden 64 = 2 heads of 32, tied embeddings, float32.

    The initial weights are large enough that the next-token distribution is far from uniform, so that a stale or
    mixed weight changes the log-probabilities.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=[chr(i) for i in range(33, 112)]
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(["add two numbers and say the sum : 12 + 30 = 42"] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD).save_pretrained(path)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("qwen2") / "model")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick start's untrained model."""
    from recipes.models.prepare import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", seed=0)


@pytest.fixture(scope="module")
def no_report() -> Iterator[None]:
    """Disable report.html: reports take most of the time of a short run, and have their own tests."""
    from recipes.loop.run_dir import RunDir

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "_report", lambda self: self.path / "report.html")
        yield
