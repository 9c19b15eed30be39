"""Supported model families, by the first entry of `architectures` in config.json."""

from __future__ import annotations

from conversion.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from conversion.families.glm4 import GLM4
from conversion.families.glm4_moe import GLM4_MOE
from conversion.families.granite import GRANITE
from conversion.families.internlm3 import INTERNLM3
from conversion.families.llama import LLAMA
from conversion.families.mistral import MISTRAL
from conversion.families.mixtral import MIXTRAL
from conversion.families.olmo2 import OLMO2
from conversion.families.phi3 import PHI3
from conversion.families.qwen2 import QWEN2
from conversion.families.qwen2_moe import QWEN2_MOE
from conversion.families.qwen3 import QWEN3
from conversion.families.qwen3_moe import QWEN3_MOE
from conversion.families.seed_oss import SEED_OSS
from conversion.families.smollm3 import SMOLLM3
from conversion.fields import shown
from conversion.table import Family

FAMILIES: dict[str, Family] = {
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "Glm4ForCausalLM": GLM4,
    "Glm4MoeForCausalLM": GLM4_MOE,
    "GraniteForCausalLM": GRANITE,
    "InternLM3ForCausalLM": INTERNLM3,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "MixtralForCausalLM": MIXTRAL,
    "Olmo2ForCausalLM": OLMO2,
    "Phi3ForCausalLM": PHI3,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "SeedOssForCausalLM": SEED_OSS,
    "SmolLM3ForCausalLM": SMOLLM3,
}

_GEMMA3 = (
    "Gemma-3 has two rotary bases, one for local and one for global layers, where Megatron-Core 0.16 has one, and "
    "windows that our packed attention lacks"
)
REFUSED: dict[str, str] = {
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "GptOssForCausalLM": "gpt-oss needs attention sinks and windows, which our packed attention lacks, and stores its "
    "experts transposed, interleaved and in 4 bits, which no table reads",
    "Olmo3ForCausalLM": "OLMo-3 scales the rotary embedding of its global layers alone; Megatron has one for all",
}


def find_family(architecture: str | None) -> Family:
    """The family of an architecture; ValueError with the supported ones for any other."""
    if architecture not in FAMILIES:
        reason = f" ({REFUSED[architecture]})" if architecture in REFUSED else ""
        names = ", ".join(sorted(name.removesuffix("ForCausalLM") for name in FAMILIES))
        raise ValueError(
            f"architecture {shown(architecture)} is not supported{reason}; supported: {names} (ForCausalLM); "
            "others only by --backend megatron-bridge, and not for training"
        )
    return FAMILIES[architecture]
