"""Memory of a learner rank against sums worked out by hand; tests/distributed/test_learner_memory.py measures it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import conversion
from configs.schema import Config, OptimConfig, ParallelConfig
from recipes import plan
from recipes.checks.settings import load_checked
from recipes.planning import memory

QWEN2_5_7B = {
    **{"architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064},
    **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    **{"max_position_embeddings": 131072, "tie_word_embeddings": False},
}
TOKENS = 4096
SETTINGS = (
    "model.dtype=float32 data.max_prompt_tokens=512 rollout.prompts_per_step=32 rollout.n=8 rollout.max_tokens=24 "
    f"rollout.max_model_len=128 train.steps=120 train.mini_batch_prompts=2 train.micro_batch_tokens={TOKENS}"
).split()
# The tiny model: hidden 128, 2 layers, 4 heads of 32, so q 128 and kv 64; MLP 256; vocabulary 32, tied. In float32.
TINY = conversion.parse_config(plan.GENERATED_MODELS["tiny"])
NORMS = 2 * 128 * (2 * 4 + 4)  # bytes per token of a layer: input, normalised, output, twice
HEADS = (3 * 128 + 2 * 64) * 4 + 4 * 4  # attention, and the softmax's sums
ROPE = 4 * 32 * 4
MLP = 5 * 256 * 4
LAYER = NORMS + HEADS + ROPE + MLP


@pytest.fixture(scope="module")
def base() -> Config:
    return load_checked(SETTINGS)


def change(config: Config, section: str, **changes: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **changes)})


def test_parameters_of_qwen2_5_7b() -> None:
    """7.61 B by its model card. By hand, per layer: q and o 2 * 3584^2, k and v 2 * 3584 * 512, their biases
    3584 + 2 * 512, MLP 3 * 3584 * 18944, two norms; outside: two tables of 152064 * 3584 and a norm."""
    layer = 2 * 3584**2 + 2 * 3584 * 512 + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584
    assert memory.parameter_count(conversion.parse_config(QWEN2_5_7B)) == 28 * layer + 2 * 152064 * 3584 + 3584


def test_parameters_of_pipeline_stages_and_tensor_slices() -> None:
    """The tiny model: hidden 128, 2 layers, q 128, kv 64 each, MLP 256, vocabulary 32, tied."""
    hf = conversion.parse_config(plan.GENERATED_MODELS["tiny"])
    matrices, norms, table = 128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 256, 2 * 128, 32 * 128
    assert memory.stage_parameters(hf, ParallelConfig()) == [2 * (matrices + norms) + table + 128]
    # Two stages: each one layer; the embedding first, the final norm and a copy of the embedding last.
    first, last = memory.stage_parameters(hf, ParallelConfig(pp=2))
    assert (first, last) == (matrices + norms + table, matrices + norms + table + 128)
    # tp 2 halves matrices and tables; norms are whole.
    assert memory.stage_parameters(hf, ParallelConfig(tp=2))[0] == matrices + 2 * norms + table // 2 + 128
    # An untied output layer is on the last stage too.
    untied = replace(hf, tied=False)
    assert memory.stage_parameters(untied, ParallelConfig())[0] == 2 * (matrices + norms) + 2 * table + 128


def test_padding_of_the_vocabulary_counts() -> None:
    hf = replace(conversion.parse_config(plan.GENERATED_MODELS["tiny"]), vocab_size=31)
    whole, halved = (memory.stage_parameters(hf, ParallelConfig(tp=tp))[0] for tp in (1, 2))
    matrices = 2 * (128 * 256 + 128 * 128 + 3 * 128 * 256)
    assert whole - halved == matrices // 2 + 31 * 128 - 16 * 128  # 31 rows become 16 per rank


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
    assert sum(memory.bytes_per_parameter(dtype, optim, shards or 8)) == expected


def moment(layer: float, *, tokens: int = TOKENS, tp: int = 1) -> float:
    """One layer's backward (the larger moment, for a vocabulary of 32), and the head's waiting gradient."""
    return layer + tokens * (2 * 256 * 4 / tp + 3 * 128 * 4) + 2 * 256 * 128 * 4 / tp + 32 * 128 * 4 / tp


def test_memory_of_the_tiny_model_by_hand(base: Config) -> None:
    parameters = memory.parameter_count(TINY)
    got = memory.learner_memory(base, TINY)
    assert (got.weights, got.gradients, got.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert got.activations == TOKENS * 2 * LAYER
    head = TOKENS * 128 * (12 + 12) + TOKENS * 32 * 4 + 32 * 128 * 4  # norm, rows; all logits in one block; gradient
    assert got.momentary == max(moment(0), head)
    assert got.total == 16 * parameters + got.activations + got.momentary and got.host == 0


def test_recomputation_keeps_inputs_and_one_layer(base: Config) -> None:
    got = memory.learner_memory(change(base, "model", recompute=True), TINY)
    assert got.activations == TOKENS * 2 * 128 * 4 and got.momentary == moment(TOKENS * LAYER)


def test_recomputing_the_mlp_keeps_the_rest_of_every_layer(base: Config) -> None:
    got = memory.learner_memory(change(base, "model", recompute=True, recompute_modules=["mlp"]), TINY)
    assert got.activations == TOKENS * 2 * (LAYER - MLP) and got.momentary == moment(TOKENS * MLP)


def test_a_background_checkpoint_is_on_the_host(base: Config) -> None:
    """Each of four ranks copies its quarter of the state and of the weights."""
    four = change(change(base, "optim", distributed=True), "parallel", nproc=4)
    got = memory.learner_memory(change(four, "train", async_save=True), TINY)
    assert memory.learner_memory(four, TINY).host == 0
    assert got.host == (8 + 4) * memory.parameter_count(TINY) / 4


def test_tensor_and_sequence_parallelism_cut_activations(base: Config) -> None:
    """Norms, sines and cosines are whole on every tensor-parallel rank; sequence parallelism cuts the norms."""
    tp2, sp = change(base, "parallel", tp=2), change(base, "parallel", tp=2, sp=True)
    assert memory.layer_activations(tp2, TINY) == NORMS + (HEADS + MLP) / 2 + ROPE
    assert memory.layer_activations(sp, TINY) == (NORMS + HEADS + MLP) / 2 + ROPE


def test_context_parallelism_gathers_keys_and_keeps_a_mask(base: Config) -> None:
    """Per token of the rank: keys and values of two ranks, and a row of the mask over at most 127 keys."""
    cp2 = change(base, "parallel", cp=2)
    assert memory.layer_activations(cp2, TINY) == LAYER + 2 * 64 * 4 + 127 * 4
    assert memory.learner_memory(cp2, TINY).activations == TOKENS / 2 * 2 * (LAYER + 2 * 64 * 4 + 127 * 4)


def test_transformer_engine_and_fp8_by_hand(base: Config) -> None:
    bf16 = change(base, "model", dtype="bfloat16")
    assert memory.layer_kind(bf16) == "transformer_engine"
    heads = (2 * 128 + 2 * 64) * 2 + 4 * 4
    assert memory.layer_activations(bf16, TINY) == 4 * 128 * 2 + heads + 3 * 256 * 2
    fp8 = change(base, "model", dtype="bfloat16", fp8="e4m3")
    assert memory.layer_activations(fp8, TINY) == 2 * 128 * 3 + heads + 128 + 256 * 5
    extra = memory.learner_memory(fp8, TINY).weights - memory.learner_memory(bf16, TINY).weights
    layers = 2 * (128 * 256 + 128 * 128 + 3 * 128 * 256 + 2 * 128)
    assert extra == 2 * layers, "rows and columns of every layer's weights in a byte each"
    local = change(base, "model", dtype="bfloat16", transformer_impl="local")
    assert memory.layer_activations(local, TINY) == 2 * 128 * 10 + (3 * 128 + 2 * 64) * 2 + 16 + 5 * 512 + 4 * 32 * 2


def test_experts_that_a_token_visits_count(base: Config) -> None:
    experts = conversion.config.Experts(count=8, ffn_hidden_size=64, top_k=2, normalise_top_k=True)
    hf = replace(TINY, experts=experts)
    assert memory.layer_activations(base, hf) == LAYER - MLP + 5 * 2 * 64 * 4 + 2 * 2 * 128 * 4 + 3 * 4 * 8


def test_norms_of_queries_and_keys_count(base: Config) -> None:
    with_norms = replace(TINY, qk_norm=True)
    assert memory.layer_activations(base, with_norms) == LAYER + 3 * (128 + 64) * 4
    bf16 = change(base, "model", dtype="bfloat16")
    extra = memory.layer_activations(bf16, with_norms) - memory.layer_activations(bf16, TINY)
    assert extra == (128 + 2 * 64) * 2


def test_the_fuller_pipeline_stage_counts(base: Config) -> None:
    """Stage 0 keeps the activations of two micro-batches, stage 1 those of one, and the head."""
    config = change(base, "parallel", pp=2)
    got = memory.learner_memory(config, TINY)
    assert got.activations == 2 * TOKENS * LAYER
    assert got.momentary == moment(0) - 32 * 128 * 4, "nothing waits for an embedding on another stage"
    wide = memory.learner_memory(config, replace(TINY, vocab_size=320_000))
    assert wide.activations == TOKENS * LAYER
    assert wide.momentary == TOKENS * 128 * 24 + 2**22 * 4 + 320_000 * 128 * 4, "a block of logits, not all"


def test_chunks_of_logits(base: Config) -> None:
    hf = replace(TINY, vocab_size=32_000, tied=False)
    fixed = TOKENS * 128 * 24 + 32_000 * 128 * 4

    def head(chunk_tokens: int) -> float:
        return memory.head_memory(change(base, "train", loss_chunk_tokens=chunk_tokens), hf, TOKENS) - fixed

    assert head(100) == 100 * 32_000 * 4 and head(10**6) == TOKENS * 32_000 * 4 and head(0) == 2**22 * 4


def test_context_and_data_parallel_ranks_share_the_distributed_state(base: Config) -> None:
    plain = memory.learner_memory(base, TINY)
    config = change(change(base, "parallel", cp=2, nproc=4), "optim", distributed=True)
    sharded = memory.learner_memory(config, TINY)
    assert sharded.optimizer == plain.optimizer / 4 and sharded.weights == plain.weights


def test_expert_parallelism_divides_experts_and_not_their_share_of_the_state(base: Config) -> None:
    """Four ranks: each has half of the experts, whose state two ranks share; the rest of the state four do."""
    raw = {
        **{"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "head_dim": 16},
        **{"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
        **{"max_position_embeddings": 512, "vocab_size": 64, "tie_word_embeddings": False},
        **{"decoder_sparse_step": 1, "mlp_only_layers": []},
    }
    hf = conversion.parse_config(raw)
    experts = 2 * 4 * 3 * 32 * 64
    others = memory.parameter_count(hf) - experts
    config = change(change(base, "parallel", ep=2, nproc=4), "optim", distributed=True)
    got = memory.learner_memory(config, hf)
    assert got.weights == 4 * (others + experts / 2)
    assert got.optimizer == 8 * (others / 4 + experts / 2 / 2)


def test_what_is_on_the_host(base: Config) -> None:
    """Offloaded state and activations use the GPU at different times; a reference is on the host, twice."""
    plain = memory.learner_memory(base, TINY)
    offloaded = memory.learner_memory(change(base, "optim", offload=True), TINY)
    backward = plain.activations + plain.momentary
    assert offloaded.total == plain.weights + plain.gradients + max(backward, plain.optimizer)
    assert offloaded.host == plain.optimizer and offloaded.total < plain.total
    small = change(change(base, "optim", offload=True), "train", micro_batch_tokens=1)
    small = change(small, "rollout", max_model_len=2)
    assert memory.learner_memory(small, TINY).total == 16 * memory.parameter_count(TINY), "the step itself needs it"
    reference = memory.learner_memory(change(base, "reference", kl_coef=0.1), TINY)
    assert reference.total == plain.total and reference.host == 2 * plain.weights


def test_a_critic_is_a_second_model(base: Config) -> None:
    one, two = (memory.learner_memory(c, TINY) for c in (base, change(base, "advantage", name="gae")))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(two, part) == 2 * getattr(one, part)
    assert (two.activations, two.momentary) == (one.activations, one.momentary)


def test_colocated_servers_send_all_of_the_learner_to_the_host(base: Config) -> None:
    alone = memory.learner_memory(base, TINY)
    turns = memory.learner_memory(change(base, "rollout", colocated=True), TINY)
    assert alone.host == 0 and turns.host == alone.weights + alone.optimizer
    assert turns.total == alone.total, "the learner has the GPU to itself in its turn"


def test_uneven_stages_and_full_middle_ones(base: Config) -> None:
    """Eight layers over three stages: one with the embedding, one with the head, and the rest between them."""
    hf = replace(TINY, num_layers=8)
    even = ParallelConfig(pp=2)
    layer = memory.stage_parameters(hf, even)[0] // 4 - 32 * 128 // 4
    p = ParallelConfig(pp=3, first_stage_layers=1, last_stage_layers=1)
    table = 32 * 128
    assert memory.stage_parameters(hf, p) == [layer + table, 6 * layer, layer + table + 128]
    uneven = memory.learner_memory(replace(base, parallel=p), hf)
    assert uneven.weights == 4 * 6 * layer
    assert uneven.activations == TOKENS * 6 * LAYER * 2, "of two micro-batches"


def test_the_cheapest_recomputation_that_fits(base: Config) -> None:
    """7B in bfloat16 on eight GPUs: nothing, the MLP, whole layers, as memory decreases; or no option fits."""
    hf = conversion.parse_config(QWEN2_5_7B)
    config = change(base, "model", dtype="bfloat16")
    config = change(change(config, "optim", distributed=True), "parallel", nproc=8)
    config = change(config, "train", micro_batch_tokens=16384)
    sizes = {}
    for recompute, modules in ((False, []), (True, ["mlp"]), (True, [])):
        changed = change(config, "model", recompute=recompute, recompute_modules=modules)
        sizes[recompute, *modules] = memory.learner_memory(changed, hf).total
    found = [plan.cheapest_recomputation(config, hf, size) for size in sizes.values()]
    assert [override for override, _, _ in found] == [
        *("model.recompute=false", "model.recompute=true model.recompute_modules=[mlp]", "model.recompute=true")
    ]
    assert [total for _, total, _ in found] == list(sizes.values())
    costs = [cost for _, _, cost in found]
    # Of a layer's parameters 3 x 3584 x 18944 are the MLP's, 2 x 3584 x 3584 + 2 x 3584 x 512 attention's.
    assert costs == pytest.approx([0, 203.7 / (203.7 + 29.36) / 3, 1 / 3], rel=1e-3)
    assert plan.cheapest_recomputation(config, hf, min(sizes.values()) - 1) is None
