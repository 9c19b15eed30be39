"""Supported model families, by the first entry of `architectures` in config.json."""

from __future__ import annotations

from conversion.families.internlm3 import INTERNLM3
from conversion.families.llama import LLAMA
from conversion.families.mistral import MISTRAL
from conversion.families.qwen2 import QWEN2
from conversion.families.qwen3 import QWEN3
from conversion.families.qwen3_moe import QWEN3_MOE
from conversion.families.seed_oss import SEED_OSS
from conversion.fields import shown
from conversion.table import Family

FAMILIES: dict[str, Family] = {
    "InternLM3ForCausalLM": INTERNLM3,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "SeedOssForCausalLM": SEED_OSS,
}

REFUSED: dict[str, str] = {
    "Olmo2ForCausalLM": "OLMo-2 normalises queries and keys over all heads together, Megatron over each head alone",
}


def find_family(architecture: str | None) -> Family:
    """The family of an architecture; ValueError with the supported ones for any other."""
    if architecture not in FAMILIES:
        reason = f" ({REFUSED[architecture]})" if architecture in REFUSED else ""
        raise ValueError(
            f"architecture {shown(architecture)} is not supported{reason}; supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[architecture]
