"""The directory that Megatron-LM takes as `--load`: requirements of its loader (megatron/training/checkpointing.py).

Megatron-LM core_v0.16.1 itself loaded such a directory (TP1, and TP2 with PP2), and the directory that it saved was
verified bit for bit: docs/conversion.md says how. The tests here check the preconditions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import SIZES, write_random

import conversion
from conversion import hf_to_megatron, megatron_to_hf
from conversion.megatron_args import megatron_lm_arguments, megatron_lm_flags
from conversion.publish import TRACKER
from conversion.sources import open_source
from conversion.verify import compare

RAW: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    **SIZES,
    "head_dim": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
# Read without a default by `check_checkpoint_args`, then what `load_args_from_checkpoint` sets for this architecture.
COMPARED = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "add_position_embedding": False}
TAKEN = {"ffn_hidden_size": 24, "num_query_groups": 2, "group_query_attention": True, "kv_channels": 4, "swiglu": True}
TAKEN |= {"rotary_base": 1000000, "rotary_percent": 1.0, "add_bias_linear": False, "add_qkv_bias": False}
TAKEN |= {"normalization": "RMSNorm", "untie_embeddings_and_output_weights": True, "num_experts": None}
TAKEN |= {"position_embedding_type": "rope", "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    source = write_random(tmp_path / "hf", RAW)
    hf_to_megatron.convert(source, tmp_path / "root", layout="megatron-lm", threads=2)
    return tmp_path / "root"


def test_the_tracker_names_a_release_with_everything_that_megatron_lm_reads(root: Path) -> None:
    assert (root / TRACKER).read_text().strip() == "release" and TRACKER == "latest_checkpointed_iteration.txt"
    assert json.loads((root / "release" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    with torch.serialization.safe_globals([argparse.Namespace]):  # as Megatron registers it
        common = torch.load(root / "release" / "common.pt", weights_only=True)
    assert common["checkpoint_version"] >= 2.0, "else Megatron-LM reorders query, key and value"
    assert common["iteration"] == 0 and {**COMPARED, **TAKEN}.items() <= vars(common["args"]).items()


def test_the_root_is_read_verified_and_replaced_like_any_checkpoint(root: Path) -> None:
    source = root.with_name("hf")
    assert compare(open_source(source), open_source(root)).equal
    megatron_to_hf.convert(root, root.with_name("back"))
    first, second = (load_file(d / "model.safetensors") for d in (source, root.with_name("back")))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    with pytest.raises(ValueError, match="exists already"):
        hf_to_megatron.convert(source, root, layout="megatron-lm")
    hf_to_megatron.convert(source, root, layout="megatron-lm", overwrite=True)
    (root / "iter_0000100").mkdir()
    (root / "iter_0000100" / "common.pt").write_text("training went on here")
    with pytest.raises(ValueError, match="iter_0000100/common.pt"):
        hf_to_megatron.convert(source, root, layout="megatron-lm", overwrite=True)


def test_what_training_went_on_to_save_there_finds_its_config(root: Path) -> None:
    saved = root / "iter_0000100"  # as Megatron-LM leaves it: no config.json, no manifest
    hf_to_megatron.convert(root.with_name("hf"), saved)
    (saved / "manifest.json").unlink()
    for path in (saved / "hf").iterdir():
        path.unlink()
    (saved / "hf").rmdir()
    (root / TRACKER).write_text("100")
    source = open_source(root)
    assert source.directory == saved and compare(open_source(root.with_name("hf")), source).equal


def test_flags_say_what_the_checkpoint_cannot() -> None:
    llama3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    raw = {**RAW, "architectures": ["LlamaForCausalLM"]}
    raw["rope_scaling"] = {**llama3, "original_max_position_embeddings": 8192}
    flags = megatron_lm_flags(conversion.parse_config(raw))
    assert {"--use-rope-scaling", "--rope-scaling-factor 32", "--norm-epsilon 1e-06"} <= set(flags)
    assert "--qk-layernorm" in megatron_lm_flags(conversion.parse_config(RAW)) and "--qk-layernorm" not in flags
    moe = {**RAW, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2}
    arguments = megatron_lm_arguments(conversion.parse_config(moe))
    assert (arguments["num_experts"], arguments["moe_router_topk"]) == (4, 2)


@pytest.mark.parametrize(
    ("architecture", "changes", "flags"),
    [
        ("MistralForCausalLM", {"sliding_window": 16}, {"--window-size 15,0"}),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, {"--no-rope-freq '[0,1]'"}),
        (
            "Qwen2MoeForCausalLM",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
            | {"shared_expert_intermediate_size": 8},
            {"--moe-shared-expert-gate", "--moe-router-load-balancing-type none"},
        ),
        (
            "DeepseekV3ForCausalLM",
            {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 6, "n_routed_experts": 8, "n_group": 4}
            | {"topk_group": 2, "num_experts_per_tok": 4, "first_k_dense_replace": 1},
            {"--multi-latent-attention", "--q-lora-rank 6", "--moe-router-num-groups 4", "--moe-router-group-topk 2"},
        ),
    ],
)
def test_what_changes_results_is_in_the_flags(architecture: str, changes: dict[str, Any], flags: set[str]) -> None:
    assert flags <= set(megatron_lm_flags(conversion.parse_config({**RAW, "architectures": [architecture], **changes})))
