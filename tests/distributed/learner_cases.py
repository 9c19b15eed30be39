"""The tiny model, the recorded batch and the layouts that the tests of the learner share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs.schema import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megatron_ext.rl.types import TokenStats

if TYPE_CHECKING:  # Megatron is imported in the spawned processes only
    from megatron_ext.learner.step import TrainBatch

VOCAB = 37  # odd: padded under tensor parallelism
LENGTHS = (1, 9, 3, 1, 11, 5, 7, 2, 8, 4, 6)  # of the responses
GROUPS = (0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3)
MAX_TOKENS = 12
FIELDS = ("logp", "entropy", "sum_p2", "sum_p2_logp")


@dataclass(frozen=True)
class Layout:
    name: str
    world: int
    parallel: dict[str, int] = field(default_factory=dict)
    distributed_optimizer: bool = False


ONE = Layout("one", 1)
TP2, PP2 = Layout("tp2", 2, {"tp": 2}), Layout("pp2", 2, {"pp": 2})
DP2, DP2_SHARDED = Layout("dp2", 2), Layout("dp2-distributed-optimizer", 2, distributed_optimizer=True)


def make_model(directory: Path, *, layers: int = 2) -> Path:
    """Random Qwen2 (biases, grouped queries, tied embeddings) whose next-token distribution is far from uniform."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _save(Qwen2ForCausalLM, Qwen2Config(**_SHAPE, num_hidden_layers=layers, tie_word_embeddings=True), directory)


def make_moe_model(directory: Path) -> Path:
    """Random Qwen3-MoE: four experts, two for each token, norms on queries and keys, heads wider than
    hidden / heads, an output layer of its own."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    config = Qwen3MoeConfig(**_SHAPE, **experts, head_dim=16, num_hidden_layers=2, tie_word_embeddings=False)
    return _save(Qwen3MoeForCausalLM, config, directory)


def make_olmo3_model(directory: Path) -> Path:
    """Random OLMo-3: norms after attention and MLP, and over all heads of queries and of keys; windows in one of two
    layers, each with a rotary embedding of its own."""
    from transformers import Olmo3Config, Olmo3ForCausalLM

    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3, "num_hidden_layers": 2}
    config = Olmo3Config(**_SHAPE, **layers, rope_parameters={"full_attention": yarn}, tie_word_embeddings=False)
    return _save(Olmo3ForCausalLM, config, directory)


def make_shared_expert_model(directory: Path) -> Path:
    """Random Qwen2-MoE: a layer without experts, and one with four and a gated shared expert."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    experts |= {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 2}
    config = Qwen2MoeConfig(**_SHAPE, **experts, num_hidden_layers=2, tie_word_embeddings=False)
    return _save(Qwen2MoeForCausalLM, config, directory)


def make_deepseek_model(directory: Path) -> Path:
    """Random DeepSeek-V3: latent attention, a dense layer, and one with a shared expert and a biased choice of four."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    heads = {"num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 10, "v_head_dim": 6}
    heads |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
    experts |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    config = DeepseekV3Config(**_SHAPE | heads | experts, num_hidden_layers=2, tie_word_embeddings=False)
    return _save(DeepseekV3ForCausalLM, config, directory)


_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "dtype": "float32",
}


def _save(model_class: Any, config: Any, directory: Path) -> Path:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases are initialised to 0 and norms to 1, which hides errors
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    model.save_pretrained(directory)
    return directory


def make_config(layout: Layout, dtype: str, optim: OptimConfig, *, micro_batch_tokens: int = 16) -> Config:
    optim.distributed = layout.distributed_optimizer
    return Config(
        model=ModelConfig(dtype=dtype),
        optim=optim,
        parallel=ParallelConfig(**layout.parallel),  # type: ignore[arg-type]
        train=TrainConfig(micro_batch_tokens=micro_batch_tokens),
    )


def make_batch(dtype: torch.dtype, order: Sequence[int] | None = None) -> TrainBatch:
    """The recorded batch, its samples in the given order. Every per-token tensor affects the result.

    ``old_logp`` is a placeholder for noise that is added to the statistics of the first weights, so that ratios leave
    the clipping interval on both sides.
    """
    from megatron_ext.learner.step import TrainBatch

    order = range(len(LENGTHS)) if order is None else order
    generator = torch.Generator().manual_seed(9)
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        prompt = torch.randint(VOCAB, (int(torch.randint(1, 7, (1,), generator=generator)),), generator=generator)
        rows.append(
            {
                "prompt": prompt.tolist(),
                "response": torch.randint(VOCAB, (length,), generator=generator).tolist(),
                "noise": torch.randn(length + 1, generator=generator, dtype=torch.float64) * 0.3,
                "advantage": torch.randn(1, generator=generator, dtype=torch.float64).expand(length),
                "keep": torch.rand(length, generator=generator) > 0.2,
                "kl": 0.1 * (torch.rand(length, generator=generator, dtype=torch.float64) > 0.8),
                "is": 0.5 + torch.rand(length, generator=generator, dtype=torch.float64),
            }
        )
        rows[-1]["noise"] = rows[-1]["noise"][1:] + rows[-1]["noise"][0]  # a common offset, for sequence ratios
    rows = [rows[i] for i in order]

    def flat(name: str) -> Tensor:
        values = torch.cat([row[name] for row in rows])
        return values.to(dtype) if values.is_floating_point() else values

    mask = torch.cat([torch.full((len(row["response"]),), True) for row in rows])
    filtered = list(order).index(5)  # one sample is not trained
    batch = TrainBatch(
        prompts=[row["prompt"] for row in rows],
        responses=[row["response"] for row in rows],
        old_logp=flat("noise"),
        advantages=flat("advantage"),
        mask=mask,
        keep=flat("keep"),
        kl_coef=flat("kl"),
        entropy_coef=torch.full_like(flat("kl"), 0.01),
        is_weight=flat("is"),
    )
    batch.mask = batch.seq_ids != filtered
    return batch


def make_experts(order: Sequence[int], layers: int, count: int = 4, top_k: int = 2) -> list[Tensor]:
    """Routing for the samples of `make_batch`: (fed tokens, layers, top_k) uint8 each, random experts."""
    batch = make_batch(torch.float32)
    chosen = []
    for sample, (prompt, response) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
        generator = torch.Generator().manual_seed(100 + sample)
        scores = torch.rand(len(prompt) + len(response) - 1, layers, count, generator=generator)
        chosen.append(scores.topk(top_k).indices.to(torch.uint8))
    return [chosen[sample] for sample in order]


def aggregation_weights(name: str, samples: Sequence[int], order: Sequence[int] | None = None) -> Tensor:
    """(B,) weights of the samples (indices into the ordered batch), 0 elsewhere, with the global denominator."""
    from megatron_ext.rl.aggregation import sequence_weights

    order = list(range(len(LENGTHS)) if order is None else order)
    lengths = torch.tensor([LENGTHS[i] for i in order])
    groups = torch.tensor([GROUPS[i] for i in order])
    included = torch.tensor([i != 5 for i in order])
    index = torch.tensor(list(samples))
    weights = torch.zeros(len(order), dtype=torch.float64)
    weights[index] = sequence_weights(
        name, lengths[index], groups[index], max_tokens=MAX_TOKENS, include_B=included[index]
    )
    return weights


def stack(stats: TokenStats) -> Tensor:
    """(4, T)."""
    return torch.stack([getattr(stats, name) for name in FIELDS])
