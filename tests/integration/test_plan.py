"""The dry-run plan: arithmetic against numbers worked out by hand, parameters against a real model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import conversion
from configs.schema import Config
from recipes import plan
from recipes.checks.settings import load_checked
from recipes.models.prepare import make_tiny_model

GIB = 1 << 30
# Sizes of public models, from their config.json, with the parameter counts their model cards state.
QWEN2_5_7B = {
    **{"architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064},
    **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    **{"max_position_embeddings": 131072, "tie_word_embeddings": False},
}
SMOLLM2_PARAMETERS = 134_515_008
# Explicit, so that tuning the quick start does not change the expected numbers.
SETTINGS = (
    "model.dtype=float32 data.max_prompt_tokens=512 rollout.prompts_per_step=32 rollout.n=8 rollout.max_tokens=24 "
    "rollout.max_model_len=128 train.steps=120 train.mini_batch_prompts=2 train.epochs=1 train.micro_batch_tokens=4096"
).split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", 0)


@pytest.fixture(scope="module")
def base() -> Config:
    return load_checked(SETTINGS)


def change(config: Config, section: str, **changes: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **changes)})


# ------------------------------------------------------------------------------------------------- generated models


def test_parameters_of_a_real_tiny_model(tiny: Path) -> None:
    from safetensors import safe_open

    with safe_open(tiny / "model.safetensors", framework="pt") as tensors:
        real = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert plan.parameter_count(conversion.read_config(tiny)) == real


def test_known_sizes_of_generated_models_are_the_real_ones(tiny: Path) -> None:
    real, known = conversion.read_config(tiny), conversion.parse_config(plan.GENERATED_MODELS["tiny"])
    assert replace(known, raw=real.raw, rope=real.rope) == real
    assert plan.parameter_count(conversion.parse_config(plan.GENERATED_MODELS["smollm2"])) == SMOLLM2_PARAMETERS


# ------------------------------------------------------------------------------------------------------------ batch


def test_batch_arithmetic(base: Config) -> None:
    config = change(base, "rollout", prompts_per_step=128, n=8, max_tokens=16384, max_model_len=20480)
    config = change(config, "data", max_prompt_tokens=4096)
    config = change(config, "train", steps=1000, mini_batch_prompts=16, epochs=2, micro_batch_tokens=8192)
    config = change(config, "parallel", tp=2, pp=2, nproc=32)
    batch = plan.batch_plan(config)
    assert plan.data_parallel(config) == 8
    assert (batch.samples, batch.per_update, batch.per_rank) == (1024, 128, 16.0)
    assert (batch.updates_per_step, batch.updates) == (16, 16000)
    assert batch.longest == 20479  # 4096 + 16384, the last token is a target only
    assert batch.micro_batch == 20479  # one sample is never cut, whatever the budget


def test_longest_sample_is_bounded_by_the_servers_context(base: Config) -> None:
    assert plan.batch_plan(base).longest == base.rollout.max_model_len - 1 == 127
    assert plan.batch_plan(base).micro_batch == base.train.micro_batch_tokens == 4096


# --------------------------------------------------------------------------------------------------- cache and advice


def test_kv_cache_of_qwen2_5_7b(base: Config) -> None:
    """57344 bytes per token: 2 x 28 layers x 4 heads x 128 x 2 bytes."""
    config = change(base, "rollout", dtype="bfloat16", prompts_per_step=64, n=8, num_servers=4, max_num_seqs=256)
    assert plan.kv_cache_bytes(config, conversion.parse_config(QWEN2_5_7B)) == (57344, 128)
    assert plan.kv_cache_bytes(change(config, "rollout", max_num_seqs=32), conversion.parse_config(QWEN2_5_7B))[1] == 32
    latent = QWEN2_5_7B | {"architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": 28}
    # 28 layers x (512 of the latent + 64 rotated channels) x 2 bytes
    assert plan.kv_cache_bytes(config, conversion.parse_config(latent))[0] == 28 * 576 * 2


def test_savings_are_what_the_changed_configuration_needs(base: Config) -> None:
    hf = conversion.parse_config(plan.GENERATED_MODELS["tiny"])
    found = dict(plan.savings(base, hf))
    for override, total in found.items():
        assert plan.learner_memory(load_checked([*SETTINGS, *override.split()]), hf).total == total
    assert "model.recompute=true" in found and "train.micro_batch_tokens=127" in found
    assert list(found.values()) == sorted(found.values())
    recomputing = change(base, "model", recompute=True)
    assert "model.recompute=true" not in dict(plan.savings(recomputing, hf))


def test_only_layouts_that_divide_the_model_are_proposed(base: Config) -> None:
    hf = conversion.parse_config(plan.GENERATED_MODELS["tiny"])
    offered = " ".join(override for override, _ in plan.savings(change(base, "parallel", tp=2), hf))
    assert "parallel.tp=4" not in offered  # two key-value heads
    assert "parallel.pp=2 parallel.nproc=4" in offered


# ------------------------------------------------------------------------------------------------------------ print


def test_plan_is_printed_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert plan.main([*SETTINGS, f"model.cache_dir={tmp_path}", "gpu_gib=80", "loss=dapo"]) == 0
    out = capsys.readouterr().out
    for words in (
        "0.30M parameters",
        "not made yet",
        "32 prompts x 8 = 256",
        "120 x 16 = 1920",
        "Fits a GPU of 80 GiB",
    ):
        assert words in " ".join(out.split()), out
    head, _, yaml = out.partition("Configuration\n")
    assert len(head.splitlines()) < 45 and "eps_high: 0.28" in yaml
    assert not list(tmp_path.iterdir())  # nothing was created


@pytest.mark.parametrize(
    ("gpu_gib", "words"),
    [("0.1", "Does not fit a GPU of 0.1 "), ("0.105", "Tight for a GPU of 0.105 "), ("0.12", "Fits a GPU of 0.12 ")],
)
def test_verdict(gpu_gib: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The quick start's rank needs about 103 MiB, 0.1005 GiB."""
    assert plan.main([*SETTINGS, f"model.cache_dir={tmp_path}", f"gpu_gib={gpu_gib}"]) == 0
    assert words in capsys.readouterr().out


def test_plan_needs_only_config_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5_7B))
    assert plan.main([f"model.path={tmp_path}", "parallel.tp=4"]) == 0
    assert "7.62B parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("parallel.tp=8", "parallel.tp=8 does not divide the model's 28 attention heads"),
        ("parallel.pp=3", "parallel.pp=3 x parallel.vpp=1 does not divide the model's 28 layers"),
        ("parallel.pp=2 parallel.first_stage_layers=28", "the other 0 layers cannot be spread evenly over the other 1"),
        ("parallel.pp=4 parallel.last_stage_layers=6", "the other 22 layers cannot be spread evenly over the other 3"),
        ("parallel.last_stage_layers=6", "last_stage_layers=6 without pipeline stages: set parallel.pp >= 2"),
        ("parallel.pp=2 parallel.vpp=2 parallel.first_stage_layers=13", "x parallel.vpp=2 does not divide"),
        ("model.batch_invariant=true", "model.batch_invariant=true needs Transformer Engine in bfloat16 on a GPU"),
        ("rollout.engine=local rollout.batch_invariant=true", "rollout.batch_invariant=True has no effect with"),
        ("model.moe_permute_fusion=true", "model.moe_permute_fusion=true, but the model has no experts"),
        ("rollout.routing_replay=true", "rollout.routing_replay=true, and the model has no experts"),
        ("rollout.n=x", "rollout.n=x is not of the right type"),
        ("gpu_gib=big", "gpu_gib=big is not a number: give the memory of one GPU"),
    ],
)
def test_plan_refuses_in_one_line(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5_7B))
    assert plan.main([f"model.path={tmp_path}", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_remarks(base: Config) -> None:
    assert plan.remarks(change(base, "data", max_prompt_tokens=104)) == []
    text = " ".join(plan.remarks(base))
    assert "more than 104 tokens" in text  # 128 - 24, with data.max_prompt_tokens=512
    once = change(change(base, "train", mini_batch_prompts=32), "data", max_prompt_tokens=104)
    assert plan.remarks(once) == ["One optimizer step per batch: the ratio is 1, clipping never acts."]
    gspo = load_checked([*SETTINGS, "loss=gspo"])
    assert "long sequences weigh more" in " ".join(plan.remarks(gspo))
    spread = change(base, "parallel", nproc=32)
    assert "16 samples per optimizer step for 32 data ranks" in " ".join(plan.remarks(spread))
    small = change(base, "train", micro_batch_tokens=100)
    assert "127 tokens, more than train.micro_batch_tokens=100" in " ".join(plan.remarks(small))
    slow = change(base, "optim", warmup_steps=1920)
    assert "optim.warmup_steps=1920 lasts the whole run" in " ".join(plan.remarks(slow))
