"""The dry-run plan: arithmetic against numbers worked out by hand, parameters against a real model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import conversion
from configs.load import load_config
from configs.schema import Config, OptimConfig, ParallelConfig
from recipes import plan
from recipes.prepare_model import make_tiny_model

GIB = 1 << 30
# Sizes of public models, from their config.json, with the parameter counts their model cards state.
QWEN2_5_7B = {
    **{"architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064},
    **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    **{"max_position_embeddings": 131072, "tie_word_embeddings": False},
}
SMOLLM2_PARAMETERS = 134_515_008
# Written out, so that tuning the quick start changes no expected number here.
SETTINGS = (
    "model.dtype=float32 data.max_prompt_tokens=512 rollout.prompts_per_step=32 rollout.n=8 rollout.max_tokens=24 "
    "rollout.max_model_len=128 train.steps=120 train.mini_batches=16 train.epochs=1 train.micro_batch_tokens=4096"
).split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", 0)


@pytest.fixture(scope="module")
def base() -> Config:
    return load_config(SETTINGS)


def change(config: Config, section: str, **changes: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **changes)})


# ------------------------------------------------------------------------------------------------------- parameters


def test_parameters_of_a_real_tiny_model(tiny: Path) -> None:
    from safetensors import safe_open

    with safe_open(tiny / "model.safetensors", framework="pt") as tensors:
        real = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert plan.parameter_count(conversion.read_config(tiny)) == real


def test_known_sizes_of_generated_models_are_the_real_ones(tiny: Path) -> None:
    real, known = conversion.read_config(tiny), conversion.parse_config(plan.GENERATED_MODELS["tiny"])
    assert replace(known, raw=real.raw, rope=real.rope) == real
    assert plan.parameter_count(conversion.parse_config(plan.GENERATED_MODELS["smollm2"])) == SMOLLM2_PARAMETERS


def test_parameters_of_qwen2_5_7b() -> None:
    """7.61 B by its model card. By hand, per layer: q and o 2 * 3584^2, k and v 2 * 3584 * 512, their biases
    3584 + 2 * 512, MLP 3 * 3584 * 18944, two norms; outside: two tables of 152064 * 3584 and a norm."""
    layer = 2 * 3584**2 + 2 * 3584 * 512 + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584
    assert plan.parameter_count(conversion.parse_config(QWEN2_5_7B)) == 28 * layer + 2 * 152064 * 3584 + 3584


def test_parameters_of_pipeline_stages_and_tensor_slices() -> None:
    """The tiny model: hidden 128, 2 layers, q 128, kv 64 each, MLP 256, vocabulary 32, tied."""
    hf = conversion.parse_config(plan.GENERATED_MODELS["tiny"])
    matrices, norms, table = 128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 256, 2 * 128, 32 * 128
    assert plan.stage_parameters(hf, ParallelConfig()) == (2 * (matrices + norms) + table + 128,) * 2
    # Two stages: each one layer; the embedding first, the final norm and a copy of the embedding last.
    first, last = plan.stage_parameters(hf, ParallelConfig(pp=2))
    assert (first, last) == (matrices + norms + table, matrices + norms + table + 128)
    # tp 2 halves matrices and tables; norms are whole.
    assert plan.stage_parameters(hf, ParallelConfig(tp=2))[0] == matrices + 2 * norms + table // 2 + 128
    # An untied output layer is on the last stage too.
    untied = replace(hf, tied=False)
    assert plan.stage_parameters(untied, ParallelConfig())[0] == 2 * (matrices + norms) + 2 * table + 128


def test_padding_of_the_vocabulary_counts() -> None:
    hf = replace(conversion.parse_config(plan.GENERATED_MODELS["tiny"]), vocab_size=31)
    whole, halved = (plan.stage_parameters(hf, ParallelConfig(tp=tp))[0] for tp in (1, 2))
    matrices = 2 * (128 * 256 + 128 * 128 + 3 * 128 * 256)
    assert whole - halved == matrices // 2 + 31 * 128 - 16 * 128  # 31 rows become 16 per rank


# ------------------------------------------------------------------------------------------------------------ batch


def test_batch_arithmetic(base: Config) -> None:
    config = change(base, "rollout", prompts_per_step=128, n=8, max_tokens=16384, max_model_len=20480)
    config = change(config, "data", max_prompt_tokens=4096)
    config = change(config, "train", steps=1000, mini_batches=8, epochs=2, micro_batch_tokens=8192)
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


# ----------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("dtype", "optimizer", "shards", "expected"),
    [
        ("bfloat16", "adam", None, 18),  # Megatron-Core's guide: 18, or 6 + 12/d
        ("bfloat16", "adam", 4, 6 + 12 / 4),
        ("float32", "adam", None, 16),  # 16, or 8 + 8/d
        ("float32", "adam", 8, 8 + 8 / 8),
        ("float64", "adam", None, 32),  # weight, gradient, two moments of 8 bytes
        ("float32", "sgd", None, 8),
        ("bfloat16", "sgd", None, 10),  # 2, 4, and a float32 master weight
    ],
)
def test_bytes_per_parameter(dtype: str, optimizer: str, shards: int | None, expected: float) -> None:
    optim = OptimConfig(optimizer=optimizer, distributed=shards is not None)
    assert sum(plan.bytes_per_parameter(dtype, optim, shards or 8)) == expected


def test_memory_of_the_tiny_model_by_hand(base: Config) -> None:
    hf = conversion.parse_config(plan.GENERATED_MODELS["tiny"])
    parameters = plan.parameter_count(hf)
    memory = plan.learner_memory(base, hf)
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    per_layer = 4 * 128 + 2 * 128 + 2 * 64 + 4 * 256
    assert memory.activations == 4096 * 2 * per_layer * 4
    assert memory.logits == 4096 * 32 * 12
    assert memory.total == 16 * parameters + 4096 * 2 * per_layer * 4 + 4096 * 32 * 12


def test_recomputation_keeps_inputs_and_one_layer(base: Config) -> None:
    hf = conversion.parse_config(plan.GENERATED_MODELS["tiny"])
    memory = plan.learner_memory(change(base, "model", recompute=True), hf)
    assert memory.activations == 4096 * 4 * (2 * 128 + (4 * 128 + 2 * 128 + 2 * 64 + 4 * 256))


def test_tensor_and_sequence_parallelism_cut_activations(base: Config) -> None:
    hf = conversion.parse_config(plan.GENERATED_MODELS["tiny"])
    wide = 2 * 128 + 2 * 64 + 4 * 256
    assert plan.layer_activations(hf, ParallelConfig(tp=2)) == 4 * 128 + wide / 2
    assert plan.layer_activations(hf, ParallelConfig(tp=2, sp=True)) == (4 * 128 + wide) / 2


def test_the_fuller_pipeline_stage_counts(base: Config) -> None:
    """Stage 0 keeps the activations of two micro-batches, stage 1 those of one, and the logits."""
    hf = conversion.parse_config(plan.GENERATED_MODELS["tiny"])
    config = change(base, "parallel", pp=2)
    one_layer = 4096 * 4 * (4 * 128 + 2 * 128 + 2 * 64 + 4 * 256)
    memory = plan.learner_memory(config, hf)
    assert memory.activations == 2 * one_layer and memory.logits == 0
    wide_vocabulary = replace(hf, vocab_size=32000)
    memory = plan.learner_memory(config, wide_vocabulary)
    assert memory.activations == one_layer and memory.logits == 4096 * 32000 * 12


def test_context_and_data_parallel_ranks_share_the_distributed_state(base: Config) -> None:
    hf = conversion.parse_config(plan.GENERATED_MODELS["tiny"])
    plain = plan.learner_memory(base, hf)
    config = change(change(base, "parallel", cp=2, nproc=4), "optim", distributed=True)
    sharded = plan.learner_memory(config, hf)
    assert sharded.optimizer == plain.optimizer / 4
    assert sharded.activations == plain.activations / 2 and sharded.weights == plain.weights


def test_kv_cache_of_qwen2_5_7b(base: Config) -> None:
    """57344 bytes per token: 2 x 28 layers x 4 heads x 128 x 2 bytes."""
    config = change(base, "rollout", dtype="bfloat16", prompts_per_step=64, n=8, num_servers=4, max_num_seqs=256)
    assert plan.kv_cache_bytes(config, conversion.parse_config(QWEN2_5_7B)) == (57344, 128)
    assert plan.kv_cache_bytes(change(config, "rollout", max_num_seqs=32), conversion.parse_config(QWEN2_5_7B))[1] == 32


def test_savings_are_what_the_changed_configuration_needs(base: Config) -> None:
    hf = conversion.parse_config(plan.GENERATED_MODELS["tiny"])
    found = dict(plan.savings(base, hf))
    for override, total in found.items():
        assert plan.learner_memory(load_config([*SETTINGS, *override.split()]), hf).total == total
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
    assert not list(tmp_path.iterdir())  # nothing was made


@pytest.mark.parametrize(("gpu_gib", "words"), [("0.06", "Does not fit"), ("0.0665", "Tight"), ("0.08", "Fits")])
def test_verdict(gpu_gib: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The quick start's rank needs about 66 MiB, 0.0646 GiB."""
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
        ("rollout.n=x", "rollout.n=x is not of the right type"),
        ("gpu_gib=big", "gpu_gib=big is not a number: give the memory of one GPU"),
    ],
)
def test_plan_refuses_in_one_line(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5_7B))
    assert plan.main([f"model.path={tmp_path}", arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_remarks(base: Config) -> None:
    assert plan.remarks(change(base, "data", max_prompt_tokens=104)) == []
    text = " ".join(plan.remarks(base))
    assert "more than 104 tokens" in text  # 128 - 24, with data.max_prompt_tokens=512
    once = change(change(base, "train", mini_batches=1), "data", max_prompt_tokens=104)
    assert plan.remarks(once) == ["One optimizer step per batch: the ratio is 1, clipping never acts."]
    spread = change(base, "parallel", nproc=32)
    assert "16 samples per optimizer step for 32 data ranks" in " ".join(plan.remarks(spread))
    small = change(base, "train", micro_batch_tokens=100)
    assert "127 tokens, more than train.micro_batch_tokens=100" in " ".join(plan.remarks(small))
    slow = change(base, "optim", warmup_steps=1920)
    assert "optim.warmup_steps=1920 lasts the whole run" in " ".join(plan.remarks(slow))
