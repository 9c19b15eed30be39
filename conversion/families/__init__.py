"""Supported model families, by the first entry of `architectures` in config.json."""

from __future__ import annotations

from conversion.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from conversion.families.ernie4_5 import ERNIE4_5
from conversion.families.gemma3 import GEMMA3
from conversion.families.glm4 import GLM4
from conversion.families.glm4_moe import GLM4_MOE
from conversion.families.glm4_moe_lite import GLM4_MOE_LITE
from conversion.families.granite import GRANITE
from conversion.families.internlm3 import INTERNLM3
from conversion.families.llama import LLAMA
from conversion.families.minimax_m2 import MINIMAX_M2
from conversion.families.mistral import MISTRAL
from conversion.families.mixtral import MIXTRAL
from conversion.families.olmo2 import OLMO2
from conversion.families.olmo3 import OLMO3
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
    "Ernie4_5ForCausalLM": ERNIE4_5,
    "Gemma3ForCausalLM": GEMMA3,
    "Glm4ForCausalLM": GLM4,
    "Glm4MoeForCausalLM": GLM4_MOE,
    "Glm4MoeLiteForCausalLM": GLM4_MOE_LITE,
    "GraniteForCausalLM": GRANITE,
    "InternLM3ForCausalLM": INTERNLM3,
    "LlamaForCausalLM": LLAMA,
    "MiniMaxM2ForCausalLM": MINIMAX_M2,
    "MistralForCausalLM": MISTRAL,
    "MixtralForCausalLM": MIXTRAL,
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": OLMO3,
    "Phi3ForCausalLM": PHI3,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "SeedOssForCausalLM": SEED_OSS,
    "SmolLM3ForCausalLM": SMOLLM3,
}

_DELTA = "its layers with a gated delta rule are missing in Megatron-Core 0.16, and no table has those of 0.19 yet"
_MAMBA = "it has Mamba layers, which no layer here trains"
_INDEXER = "its attention looks only at the tokens that an indexer chooses, which no layer here does"
REFUSED: dict[str, str] = {
    "ArceeForCausalLM": "its MLP has no gate, and squares a ReLU: every table here has a gated MLP",
    "DeepseekV32ForCausalLM": _INDEXER,
    "Ernie4_5_MoeForCausalLM": "its router adds a bias to a softmax; Megatron's adds one only to sigmoids",
    "Gemma3ForConditionalGeneration": "a vision tower has no counterpart here: save the language model alone, as "
    "Gemma3ForCausalLM",
    "GlmMoeDsaForCausalLM": _INDEXER,
    "GptOssForCausalLM": "its experts are stored transposed, interleaved and in 4 bits, which no table reads, and its "
    "attention has sinks, which our packed attention lacks",
    "HunYuanDenseV1ForCausalLM": "it normalises queries and keys behind the rotary embedding; Megatron does so before",
    "HunYuanMoEV1ForCausalLM": "it normalises queries and keys behind the rotary embedding; Megatron does so before",
    "KimiLinearForCausalLM": _DELTA,
    "Llama4ForCausalLM": "its attention in chunks and its scaled queries have no counterpart here",
    "Llama4ForConditionalGeneration": "its attention in chunks and its vision tower have no counterpart here",
    "Ministral3ForCausalLM": "it scales queries by their position, which Megatron-Core's GPTModel does not",
    "Mistral3ForConditionalGeneration": "a vision tower has no counterpart here",
    "NemotronForCausalLM": "its MLP has no gate, and squares a ReLU: every table here has a gated MLP",
    "NemotronHForCausalLM": _MAMBA,
    "Qwen3NextForCausalLM": _DELTA,
    "Qwen3_5ForCausalLM": _DELTA,
    "Qwen3_5MoeForCausalLM": _DELTA,
    "Qwen3_5ForConditionalGeneration": _DELTA,
    "Qwen3_5MoeForConditionalGeneration": _DELTA,
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
