"""Tensor by tensor against mbridge (`pip install mbridge`), an independent implementation; skipped if absent."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import conversion

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("mbridge") is None, reason="mbridge is not installed"),
]

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "DeepseekV3": ROUTED
    | {"num_key_value_heads": 8, "q_lora_rank": 24, "kv_lora_rank": 20, "n_group": 1, "topk_group": 1}
    | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12},
    "Glm4Moe": ROUTED | {"head_dim": 16, "attention_bias": True, "use_qk_norm": True},
}


def make_bridge(config: Any) -> Any:
    """mbridge's mapping without its constructor, which needs process groups on a GPU."""
    import megatron_ext.learner  # noqa: F401  prepares Megatron, which mbridge imports, for the CPU

    from mbridge.core.bridge import _MODEL_REGISTRY  # isort: skip
    from mbridge.core.parallel_states import ParallelStates  # isort: skip
    import mbridge.models  # noqa: F401  # isort: skip

    cls = _MODEL_REGISTRY[config.model_type]
    bridge = object.__new__(cls)
    bridge.hf_config, bridge.mpu, bridge.dtype = config, ParallelStates(tp_size=2), torch.float32
    bridge.make_vocab_size_divisible_by = None
    bridge.config = SimpleNamespace(gated_linear_unit=True, mtp_num_layers=None)
    return bridge


@pytest.mark.parametrize("prefix", MODELS)
def test_every_tensor_is_what_mbridge_makes_of_it(prefix: str) -> None:
    config = getattr(transformers, prefix + "Config")(**{**SMALL, **MODELS[prefix]})
    bridge = make_bridge(config)
    hf = conversion.parse_config({**config.to_dict(), "architectures": [prefix + "ForCausalLM"]})
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(shape, generator=generator) for n, shape in conversion.hf_shapes(hf).items()}
    for name in conversion.megatron_names(hf):
        # mbridge uses Transformer Engine's names, where only a dense layer fuses the norm before the MLP
        layer = int(name.split(".")[2]) if name.startswith("decoder.layers.") else 0
        theirs = conversion.te_name(name, moe=hf.sparse(layer), latent=hf.latent is not None)
        parts = bridge._weight_name_mapping_mcore_to_hf(theirs)
        assert parts == list(conversion.hf_parts(hf, name)), name
        full = conversion.import_tensor(hf, name, state.__getitem__)
        assert torch.equal(bridge._weight_to_mcore_format(theirs, [state[part] for part in parts]), full), name
        back = dict(zip(*bridge._weight_to_hf_format(theirs, full), strict=True))
        assert all(torch.equal(back[part], tensor) for part, tensor in conversion.export_tensors(hf, name, full)), name
        ours = [conversion.shard(name, full, rank, 2) for rank in range(2)]
        pieces = bridge._weight_split_across_tp(theirs, full, ours[0], 2)
        assert all(torch.equal(mine, piece) for mine, piece in zip(ours, pieces, strict=True)), name
