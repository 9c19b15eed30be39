"""Comparison of two learners on the same tokens: statistics, gradients, and the importance ratio at learning rate 0.

Used on a GPU to compare Transformer Engine with Megatron's own layers and FP8 with bfloat16 (tests/gpu), and on a CPU
with the stand-in, which tests this code.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import learner_cases as cases
import torch
from torch import Tensor

from configs.schema import Config, OptimConfig
from megatron_ext.rl.types import LossInputs, LossOutputs

if TYPE_CHECKING:
    from megatron_ext.learner.learner import Learner


@dataclass(frozen=True)
class Measured:
    """One learner's results on the recorded batch. Per-token tensors are (T,) float64, on the CPU."""

    logp: Tensor
    entropy: Tensor
    collision: Tensor  # sum of p^2
    gradients: dict[str, Tensor]  # by parameter, of CE-GPPO on the whole batch, on the CPU
    log_ratio: Tensor  # log p in the training pass minus log p in the statistics pass, weights unchanged


def random_model(directory: Path, architecture: str, **sizes: int) -> Path:
    """A random model of "qwen2", "qwen3" or "qwen3_moe"; its norms and biases differ from their initial values."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    config_class = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}[architecture]
    small = {"vocab_size": cases.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = config_class(**{**small, **heads, "tie_word_embeddings": False, "dtype": "float32", **sizes})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.05))
    model.save_pretrained(directory)
    return directory


def settings(dtype: str, impl: str, *, micro_batch_tokens: int = 256, **model: Any) -> Config:
    """Learning rate 0, so that the update of `measure` leaves the weights as they are; no gradient clipping."""
    config = cases.make_config(
        cases.ONE, dtype, OptimConfig(lr=0.0, clip_grad=1e9), micro_batch_tokens=micro_batch_tokens
    )
    config.model = dataclasses.replace(config.model, transformer_impl=impl, **model)
    return config


def measure(config: Config, model_dir: Path) -> Measured:
    """Measure one learner, inside `megatron_ext.learner.model.distributed`, in one process."""
    from megatron_ext.learner.learner import Learner
    from megatron_ext.rl.losses import build_loss

    learner = Learner(config, model_dir, total_updates=10)
    batch, samples = cases.make_batch(torch.float32), range(len(cases.LENGTHS))
    stats = learner.statistics(batch)
    batch.old_logp = stats.logp
    loss, ratios = build_loss("ce_gppo"), []

    def watched(inputs: LossInputs) -> LossOutputs:
        ratios.append((inputs.logp - inputs.old_logp).detach().double().cpu())
        return loss(inputs)

    learner.update(batch, samples, cases.aggregation_weights("token_mean", samples), watched)
    stats_T = [tensor.double() for tensor in (stats.logp, stats.entropy, stats.sum_p2)]
    return Measured(*stats_T, gradients(learner), torch.cat(ratios))


def gradients(learner: Learner) -> dict[str, Tensor]:
    """The gradients of the latest update."""
    import conversion
    from megatron_ext.learner.weights import named_parameters

    named = named_parameters(learner.chunks).items()
    return {conversion.local_name(name): parameter.main_grad.double().cpu() for name, parameter in named}


def differences(a: Measured, b: Measured) -> dict[str, float]:
    """Differences of ``a`` from ``b``: probabilities of the sampled tokens, and gradients as a whole."""
    assert a.gradients.keys() == b.gradients.keys()
    dot = sum(float((a.gradients[name] * b.gradients[name]).sum()) for name in a.gradients)
    norm_a, norm_b = (sum(float(g.square().sum()) for g in m.gradients.values()) ** 0.5 for m in (a, b))
    return {
        "mean |dlogp|": float((a.logp - b.logp).abs().mean()),
        "mean |dp|": float((a.logp.exp() - b.logp.exp()).abs().mean()),
        "max |dlogp|": float((a.logp - b.logp).abs().max()),
        "mean |dH|": float((a.entropy - b.entropy).abs().mean()),
        "dH of the batch": float((a.entropy.mean() - b.entropy.mean()).abs()),
        "mean |dsum p2|": float((a.collision - b.collision).abs().mean()),
        "gradient norm": norm_a / norm_b - 1,
        "gradient cosine": dot / (norm_a * norm_b),
    }


def ratio_at_rate_0(measured: Measured, eps: float = 0.2) -> dict[str, float]:
    """The importance ratio where it should be 1: the training pass against the statistics pass, same weights."""
    r = measured.log_ratio.exp()
    return {
        "max |log r|": float(measured.log_ratio.abs().max()),
        "mean |log r|": float(measured.log_ratio.abs().mean()),
        "clip fraction": float(((r < 1 - eps) | (r > 1 + eps)).double().mean()),
    }
