"""The tables against transformers' own state dicts, and the transforms against Megatron's documented layouts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import conversion
from conversion import hf_to_megatron, megatron_to_hf
from conversion.config import Llama3Rope
from conversion.mapping import left_out
from conversion.megatron_keys import own_slots
from conversion.parse import in_dialect

SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
ROUTED |= {"first_k_dense_replace": 1}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2", {"tie_word_embeddings": False}),
    "llama": ("Llama", {"head_dim": 16}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "smollm2": ("Llama", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "seed-oss": ("SeedOss", {"head_dim": 16}),
    "olmo2": ("Olmo2", {}),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"mlp_only_layers": [1]},
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"shared_expert_intermediate_size": 40},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "granite": ("Granite", {"embedding_multiplier": 12.0, "attention_multiplier": 0.25, "logits_scaling": 8.0}),
    "glm4": ("Glm4", {"head_dim": 16, "pad_token_id": 0}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "deepseek-v2": (
        "DeepseekV2",
        LATENT | ROUTED | {"q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 2},
    ),
    "deepseek-v3": ("DeepseekV3", LATENT | ROUTED | {"q_lora_rank": 24, "n_group": 1, "topk_group": 1}),
    "glm4-moe": ("Glm4Moe", ROUTED | {"head_dim": 16, "attention_bias": True, "use_qk_norm": True}),
    "olmo3": ("Olmo3", {}),
    "gemma3": ("Gemma3", {"head_dim": 16}),
    "ernie4-5": ("Ernie4_5", {"head_dim": 16, "use_bias": True}),
    "minimax-m2": ("MiniMaxM2", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4-moe-lite": ("Glm4MoeLite", LATENT | ROUTED | {"q_lora_rank": 24}),
}


def make(case: str) -> tuple[conversion.HFConfig, dict[str, Tensor]]:
    """A small random transformers model: its parsed config, and its state dict under the names on disk."""
    hf, state = _make(case)
    return hf, dict(state)


@cache
def _make(case: str) -> tuple[conversion.HFConfig, dict[str, Tensor]]:
    prefix, extra = CASES[case]
    kind = getattr(transformers, prefix + "ForCausalLM")
    config = kind.config_class(**{**SMALL, **extra})
    torch.manual_seed(0)
    model = kind(config)
    raw = {**config.to_dict(), "architectures": [prefix + "ForCausalLM"]}
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    if raw["tie_word_embeddings"]:
        del state["lm_head.weight"]
    gate, up, down = ("w1", "w3", "w2") if prefix in ("Mixtral", "MiniMaxM2") else ("gate_proj", "up_proj", "down_proj")
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        fused = state.pop(name)  # in memory transformers fuses the experts, on disk they are separate
        stem = name.removesuffix("gate_up_proj").removesuffix("down_proj")
        for expert, tensor in enumerate(fused):
            parts = [(down, tensor)] if name.endswith("down_proj") else zip((gate, up), tensor.chunk(2), strict=True)
            state |= {f"{stem}{expert}.{part}.weight": piece for part, piece in parts}
    if prefix in ("Mixtral", "MiniMaxM2"):
        state = {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in state.items()}
    return conversion.parse_config(raw), state


@pytest.mark.parametrize("case", CASES)
def test_tables_cover_exactly_what_transformers_has(case: str) -> None:
    hf, state = make(case)
    assert conversion.hf_shapes(hf) == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert conversion.unconsumed(hf, state) == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("rename", [conversion.local_name, conversion.te_name])
def test_round_trip_through_every_tensor_parallel_size_is_bit_identical(case: str, tp: int, rename: Any) -> None:
    hf, state = make(case)
    back: dict[str, Tensor] = {}
    for name in conversion.megatron_names(hf):
        full = conversion.import_tensor(hf, rename(name), state.__getitem__)
        assert tuple(full.shape) == conversion.megatron_shape(hf, name)
        pieces = [conversion.shard(rename(name), full, rank, tp) for rank in range(tp)]
        assert len({piece.shape for piece in pieces}) == 1, "tensor-parallel ranks must hold equal shapes"
        back.update(conversion.export_tensors(hf, rename(name), conversion.unshard(rename(name), pieces)))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("case", ["qwen2-untied", "qwen3-moe"])
def test_streaming_in_row_blocks_equals_whole_tensors(case: str) -> None:
    hf, state = make(case)
    for name in conversion.megatron_names(hf):
        full = conversion.import_tensor(hf, name, state.__getitem__)
        unit = conversion.row_unit(hf, name)
        back = {part: torch.full_like(state[part], torch.nan) for part in conversion.hf_parts(hf, name)}
        for start in range(0, full.shape[0], 3 * unit):
            stop = min(start + 3 * unit, full.shape[0])
            block = conversion.import_rows(hf, name, start, stop, lambda part, a, b: state[part][a:b])
            assert torch.equal(block, full[start:stop])
            for part, row, rows in conversion.export_rows(hf, name, start, block):
                back[part][row : row + len(rows)] = rows
        assert all(torch.equal(back[part], state[part]) for part in back)


def test_qkv_holds_the_queries_of_a_kv_head_then_its_key_then_its_value() -> None:
    hf, state = make("qwen2-untied")  # 8 heads of 6 rows on 4 KV heads
    q, k, v = (state[f"model.layers.1.self_attn.{x}_proj.bias"] for x in "qkv")
    qkv = conversion.import_tensor(hf, "decoder.layers.1.self_attention.linear_qkv.bias", state.__getitem__)
    expected = [torch.cat([q[12 * g : 12 * g + 12], k[6 * g : 6 * g + 6], v[6 * g : 6 * g + 6]]) for g in range(4)]
    assert torch.equal(qkv, torch.cat(expected))
    # two tensor-parallel ranks get two whole KV heads each
    name = "decoder.layers.1.self_attention.linear_qkv.bias"
    assert torch.equal(conversion.shard(name, qkv, 1, 2), torch.cat(expected[2:]))


def test_each_rank_holds_its_gate_rows_above_its_up_rows() -> None:
    gate, up = torch.arange(8.0), torch.arange(8.0) + 100
    shard = conversion.shard("decoder.layers.0.mlp.linear_fc1.bias", torch.cat([gate, up]), 1, 4)
    assert shard.tolist() == [2, 3, 102, 103]


def test_the_other_tensors_are_cut_as_megatrons_parallel_layers_hold_them() -> None:
    full = torch.arange(16).reshape(4, 4)
    layer = "decoder.layers.0."
    for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):  # RowParallelLinear: input features
        assert torch.equal(conversion.shard(layer + name, full, 1, 2), full[:, 2:])
    for name in ("embedding.word_embeddings.weight", "output_layer.weight", layer + "self_attention.linear_qkv.weight"):
        assert torch.equal(conversion.shard(name, full, 1, 2), full[2:])
    for name in (
        "input_layernorm.weight",
        "self_attention.q_layernorm.weight",
        "mlp.linear_fc2.bias",
        "mlp.router.weight",
    ):
        assert torch.equal(conversion.shard(layer + name, full, 1, 2), full)


def test_vocabulary_padding_is_zero_and_never_leaks() -> None:
    hf, state = make("qwen2-tied")  # 131 tokens
    name = "embedding.word_embeddings.weight"
    full = conversion.import_tensor(hf, name, state.__getitem__)
    last = conversion.shard(name, full, 3, 4, vocab_multiple=8)
    assert conversion.padded_vocab(131, 4, 8) == 160 and last.shape[0] == 40
    assert torch.equal(last[:11], full[120:]) and not last[11:].any()
    padded = torch.cat([conversion.shard(name, full, rank, 4, vocab_multiple=8) for rank in range(4)])
    assert conversion.export_tensors(hf, name, padded)[0][1].shape[0] == 131


def test_tied_output_layer_is_the_embedding_and_is_exported_only_on_request() -> None:
    hf, state = make("qwen2-tied")
    assert "output_layer.weight" not in conversion.megatron_names(hf)
    output = conversion.import_tensor(hf, "output_layer.weight", state.__getitem__)
    assert torch.equal(output, state["model.embed_tokens.weight"])
    assert conversion.export_tensors(hf, "output_layer.weight", output) == []
    names = [n for n, _ in conversion.export_tensors(hf, "embedding.word_embeddings.weight", output)]
    assert names == ["model.embed_tokens.weight"]
    sent = dict(conversion.export_tensors(hf, "embedding.word_embeddings.weight", output, explicit_lm_head=True))
    assert torch.equal(sent["lm_head.weight"], output)


@settings(max_examples=60, deadline=None)
@given(heads=st.integers(1, 4), groups=st.integers(1, 4), head_dim=st.integers(1, 5), ffn=st.integers(1, 7))
def test_transforms_are_bijections_for_any_shape(heads: int, groups: int, head_dim: int, ffn: int) -> None:
    raw = {**SMALL, "architectures": ["LlamaForCausalLM"], "num_attention_heads": heads * groups}
    raw |= {"num_key_value_heads": groups, "head_dim": head_dim, "intermediate_size": ffn}
    hf = conversion.parse_config(raw)
    for name in conversion.megatron_names(hf):
        size = 1
        for extent in conversion.megatron_shape(hf, name):
            size *= extent
        full = torch.arange(size).reshape(conversion.megatron_shape(hf, name))
        parts = dict(conversion.export_tensors(hf, name, full))
        assert sum(part.numel() for part in parts.values()) == size
        assert torch.equal(conversion.import_tensor(hf, name, parts.__getitem__), full)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "Llama,", "Qwen2,", "--backend megatron-bridge"]),
        ({"architectures": ["GptOssForCausalLM"]}, ["sinks"]),
        ({"architectures": None}, ["None", "supported"]),
        ({"hidden_size": "48"}, ["hidden_size='48'", "positive integer"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=8", "num_key_value_heads=3"]),
        ({"hidden_size": 50}, ["hidden_size=50", "head_dim"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ({"attention_bias": True}, ["attention_bias=True", "mlp_bias=False"]),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, ["longrope", "llama3"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [2, 3]}}, ["mrope_section", "YaRN"]),
        ({"rope_scaling": {"type": "yarn", "factor": 1.0, "attention_factor": 1.2}}, ["attention_factor=1.2"]),
        ({"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 4.0}}, ["low_freq_factor=4.0", "high_freq_factor=4.0"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
    ],
)
def test_what_megatron_cannot_represent_is_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    raw = {**SMALL, "architectures": ["LlamaForCausalLM"], **changes}
    with pytest.raises(ValueError) as error:
        conversion.parse_config(raw)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_both_config_dialects_mean_the_same() -> None:
    base = {**SMALL, "architectures": ["LlamaForCausalLM"]}
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old = conversion.parse_config({**base, "rope_theta": 500000.0, "rope_scaling": scaling})
    new = conversion.parse_config({**base, "rope_parameters": LLAMA3_ROPE})
    assert old.rope == new.rope == type(old.rope)(500000.0, "llama3", 32.0, llama3=Llama3Rope())
    kwargs = conversion.gpt_model_kwargs(old)
    assert (kwargs["rotary_base"], kwargs["rope_scaling"], kwargs["rope_scaling_factor"]) == (500000, True, 32.0)


# The config.json of each release, as transformers 4 wrote it.
RELEASED_LLAMA3 = {
    "Llama-3.1-8B": {"factor": 8.0, "tie_word_embeddings": False},
    "Llama-3.2-1B": {"factor": 32.0, "tie_word_embeddings": True, "head_dim": 64},
    "Llama-3.3-70B": {"factor": 8.0, "tie_word_embeddings": False},
    "DeepSeek-R1-Distill-Llama-8B": {"factor": 8.0, "tie_word_embeddings": False, "attention_bias": False},
}


@pytest.mark.parametrize("release", RELEASED_LLAMA3)
def test_released_llama_3_configs_are_read_in_both_dialects(release: str) -> None:
    extra = dict(RELEASED_LLAMA3[release])
    scaling = {"factor": extra.pop("factor"), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
    raw = {**SMALL, "architectures": ["LlamaForCausalLM"], "rope_theta": 500000.0, "rope_scaling": scaling, **extra}
    raw["max_position_embeddings"] = 131072
    for config in (raw, in_dialect(raw, 5)):
        kwargs = conversion.gpt_model_kwargs(conversion.parse_config(config))
        assert (kwargs["rope_scaling"], kwargs["rope_scaling_factor"]) == (True, scaling["factor"])
        assert kwargs["position_embedding_type"] == "rope" and kwargs["max_sequence_length"] == 131072


@pytest.mark.parametrize("factor", [2.0, 32.0])
@pytest.mark.parametrize("constants", [(1.0, 4.0, 8192), (0.5, 3.0, 64), (2.0, 8.0, 512)])
def test_llama_3_scaling_with_any_constants_is_that_of_transformers(
    factor: float, constants: tuple[float, float, int]
) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {**LLAMA3_ROPE, "factor": factor}
    rope |= dict(
        zip(("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), constants, strict=True)
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(**SMALL, head_dim=64, rope_parameters=rope))
    raw = {**SMALL, "architectures": ["LlamaForCausalLM"], "head_dim": 64, "rope_parameters": rope}
    got = conversion.inverse_frequencies(conversion.parse_config(raw))
    if constants == (1.0, 4.0, 8192):
        assert got is None  # Megatron's own defaults
    else:
        assert got is not None and torch.allclose(got, expected, rtol=1e-6, atol=0)


YARNS: dict[str, dict[str, Any]] = {
    "as in Qwen2.5": {"factor": 4.0, "original_max_position_embeddings": 32},
    "explicit factor": {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.25},
    "two mscales": {"factor": 40.0, "original_max_position_embeddings": 32, "mscale": 0.707, "mscale_all_dim": 1.0},
    "one mscale": {"factor": 40.0, "original_max_position_embeddings": 32, "mscale": 0.707},
    "nothing to stretch": {"factor": 1.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0},
}


@pytest.mark.parametrize("yarn", YARNS)
@pytest.mark.parametrize("dialect", [4, 5])
def test_yarn_has_the_attention_factor_of_transformers(yarn: str, dialect: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = {**SMALL, "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6}
    raw |= {"rope_scaling": {"type": "yarn", **YARNS[yarn]}}
    config = transformers.Qwen2Config(**in_dialect(raw, 5))
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](config)
    hf = conversion.parse_config(in_dialect(raw, dialect))
    got = conversion.yarn_attributes(hf)
    factor = got["yarn_rotary_scaling_factor"]
    assert 0.1 * got["yarn_mscale"] * math.log(factor) + 1 == pytest.approx(expected, rel=1e-12)
    assert got["yarn_original_max_position_embeddings"] == YARNS[yarn]["original_max_position_embeddings"]
    assert (got["yarn_beta_fast"], got["yarn_beta_slow"]) == ((16, 2) if factor == 1 else (32, 1))
    assert conversion.gpt_model_kwargs(hf)["position_embedding_type"] == "yarn"
    assert conversion.yarn_attributes(conversion.parse_config({**raw, "rope_scaling": None})) == {}


def in_both_dialects(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    raw = dict(make(case)[0].raw)
    return in_dialect(raw, 4), in_dialect(raw, 5)


@pytest.mark.parametrize("case", CASES)
def test_a_config_rewritten_in_another_dialect_means_the_same_and_returns(case: str) -> None:
    old, new = in_both_dialects(case)
    assert "rope_parameters" not in old and "rope_theta" in old and "dtype" not in old
    assert "rope_parameters" in new and "rope_theta" not in new and "torch_dtype" not in new
    assert in_dialect(old, 5) == new and in_dialect(new, 4) == old
    assert replace(conversion.parse_config(old), raw={}) == replace(conversion.parse_config(new), raw={})
    config_class = getattr(transformers, CASES[case][0] + "ForCausalLM").config_class
    assert config_class(**old).rope_parameters == config_class(**new).rope_parameters
    assert getattr(config_class(**old), "num_experts", None) == getattr(config_class(**new), "num_experts", None)


def test_architecture_details_reach_megatron() -> None:
    qwen3 = conversion.transformer_config(make("qwen3")[0])
    assert (qwen3["qk_layernorm"], qwen3["kv_channels"], qwen3["add_qkv_bias"]) == (True, 16, False)
    assert conversion.transformer_config(make("qwen2-tied")[0])["add_qkv_bias"] is True
    # transformers' mask lets token i see j when i - j < 16; Megatron's window counts the tokens to the left only
    assert conversion.transformer_config(make("mistral")[0])["window_size"] == (15, 0)
    moe = conversion.transformer_config(make("qwen3-moe")[0])
    assert (moe["num_moe_experts"], moe["moe_router_topk"], moe["moe_router_pre_softmax"]) == (4, 2, True)
    raw = {**SMALL, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}
    windowed = conversion.transformer_config(conversion.parse_config({**raw, "max_window_layers": 1}))
    assert (windowed["window_size"], windowed["window_attn_skip_freq"]) == ((7, 0), [0, 1])
    assert conversion.gpt_model_kwargs(make("qwen2-tied")[0], tp_size=2)["vocab_size"] == 132


def test_unknown_missing_and_misshapen_tensors_are_named() -> None:
    hf, state = make("llama")
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    part = "model.layers.0.mlp.down_proj.weight"
    assert conversion.unconsumed(hf, [*state, "model.layers.2.mlp.down_proj.weight", "x.rotary_emb.inv_freq"]) == [
        "model.layers.2.mlp.down_proj.weight"
    ]
    with pytest.raises(ValueError, match=f"no tensor '{part}'"):
        conversion.import_tensor(hf, name, {}.__getitem__)
    with pytest.raises(ValueError, match=r"shape \(48,\) but config.json implies \(48, 80\)"):
        conversion.import_tensor(hf, name, lambda _: torch.zeros(48))
    for unknown in ("decoder.layers.2.mlp.linear_fc2.weight", "decoder.layers.0.self_attention.linear_qkv.bias"):
        with pytest.raises(ValueError, match="no counterpart in LlamaForCausalLM"):
            conversion.import_tensor(hf, unknown, state.__getitem__)
    with pytest.raises(ValueError, match="not known to the conversion tables"):
        conversion.shard("decoder.layers.0.mystery.weight", torch.zeros(2), 0, 2)
    with pytest.raises(ValueError, match="cannot be cut into 3 equal parts"):
        conversion.shard(name, torch.zeros(48, 80), 0, 3)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("deepseek-v3", {"norm_topk_prob": False}, "Megatron's router always normalises"),
        (
            "deepseek-v3",
            {"n_group": 2, "topk_group": 2},
            "best 2, Megatron's router by their best 1",
        ),
        ("deepseek-v3", {"n_group": 3}, "n_group=3 and topk_group=1 do not fit 4 experts"),
        ("deepseek-v3", {"rope_interleave": False}, "rope_interleave=False in config.json is not supported"),
        (
            "deepseek-v3",
            {"num_key_value_heads": 4},
            "num_key_value_heads=4 .* must be num_attention_heads=8",
        ),
        ("deepseek-v3", {"first_k_dense_replace": 2}, "first_k_dense_replace=2 in config.json must be less than"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek-v3", {"rope_parameters": LLAMA3_ROPE}, "rope_type=llama3 is not supported with latent attention"),
        ("deepseek-v3", {"rope_parameters": {**YARN, "truncate": False}}, "truncate=False .* is not supported"),
        ("deepseek-v3", {"rope_parameters": {**YARN, "mscale_all_dim": 1.0}}, "derives the factor from mscale"),
        ("deepseek-v2", {"topk_method": "group_limited_greedy", "n_group": 2}, "Megatron's router by their best 2"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("glm4-moe", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be between 1 and n_routed_experts=4"),
    ],
)
def test_what_megatrons_router_and_latent_attention_have_not_is_refused(
    case: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        conversion.parse_config({**make(case)[0].raw, **change})


def test_layers_for_predicting_several_tokens_are_left_out_and_named() -> None:
    hf, state = make("deepseek-v3")
    inside, beyond = "model.layers.1.mlp.extra.weight", "model.layers.2.eh_proj.weight"
    assert conversion.unconsumed(hf, [*state, inside, beyond]) == [inside]
    assert left_out(hf, [*state, beyond]) == [beyond]
    assert left_out(make("llama")[0], [beyond]) == []


def test_the_norms_of_latents_are_where_both_kinds_of_layers_look() -> None:
    hf = make("deepseek-v3")[0]  # the first layer is dense, the second has experts
    keys = {name: [slot.key for slot in own_slots(hf, name)] for name in conversion.megatron_names(hf)}
    layer = "decoder.layers.{}."
    fused = "self_attention.linear_{}_up_proj.layer_norm_weight"
    for number, kind in ((0, "q"), (1, "kv")):
        own = layer.format(number) + f"self_attention.{kind}_layernorm.weight"
        assert keys[own] == [layer.format(number) + fused.format(kind), own]
    assert keys["decoder.layers.0.input_layernorm.weight"] == ["decoder.layers.0.input_layernorm.weight"]
    own = "decoder.layers.{}.pre_mlp_layernorm.weight"
    assert keys[own.format(0)] == ["decoder.layers.0.mlp.linear_fc1.layer_norm_weight", own.format(0)]
    assert keys[own.format(1)] == [own.format(1)]
    expert = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"
    assert keys[expert] == ["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"]


def test_transformers_loads_an_export(tmp_path: Path) -> None:
    hf, state = make("llama")
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**hf.raw, "dtype": "bfloat16"}))
    save_file(state, tmp_path / "hf" / "model.safetensors")
    hf_to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back", max_shard_size=30000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
