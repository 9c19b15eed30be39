"""Supported model families, by the first entry of `architectures` in config.json."""

from __future__ import annotations

from conversion.families.llama import LLAMA
from conversion.families.mistral import MISTRAL
from conversion.families.qwen2 import QWEN2
from conversion.families.qwen3 import QWEN3
from conversion.table import Family

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}


def find_family(architecture: str | None) -> Family:
    """The family of an architecture; ValueError with the supported ones for any other."""
    if architecture not in FAMILIES:
        raise ValueError(f"architecture {architecture!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[architecture]
