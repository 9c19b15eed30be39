"""Memory on a GPU: blocks of logits, storages that leave and return."""

from __future__ import annotations

from pathlib import Path

import learner_cases as cases
import pytest
import torch

from configs.schema import OptimConfig
from megatron_ext.kernels import linear_vocab_statistics, vocab_statistics


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
def test_statistics_from_hidden_states_equal_float64(dtype: torch.dtype, tolerance: float) -> None:
    """Values in nats and gradients relative to their largest number, of the same rounded factors; TF32 allowed."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 256, generator=generator).to(dtype)
    weight = (torch.randn(20_000, 256, generator=generator) / 8).to(dtype)
    targets = torch.randint(20_000, (300,), generator=generator)

    def run(device: str, exact: bool) -> list[torch.Tensor]:
        leaves = [(x.double() if exact else x).to(device).detach().requires_grad_() for x in (hidden, weight)]
        if exact:
            stats = vocab_statistics(leaves[0] @ leaves[1].T, targets.to(device))
        else:
            stats = linear_vocab_statistics(leaves[0], leaves[1], targets.to(device), chunk_tokens=7)
        gradients = torch.autograd.grad((stats.logp + 0.1 * stats.entropy).sum(), leaves)
        return [x.detach().double().cpu() for x in (stats.logp, stats.entropy, *gradients)]

    for got, expected in zip(run("cuda", exact=False), run("cpu", exact=True), strict=True):
        scale = max(1.0, float(expected.abs().max()))
        assert float((got - expected).abs().max()) <= tolerance * scale


def test_logits_are_never_whole() -> None:
    """8192 tokens x 151936: whole logits would be 2.3 GiB in bfloat16 alone, and again for their gradient."""
    hidden = torch.randn(8192, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(151_936, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(8192, dtype=torch.int64, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stats = linear_vocab_statistics(hidden, weight, targets)
    (stats.logp + 0.1 * stats.entropy).sum().backward()
    gradients = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before < gradients + 1.2 * 2**30


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offload_frees_the_gpu_and_training_goes_on_bit_for_bit(tmp_path: Path, alone: None, dtype: str) -> None:
    from megatron_ext.learner.learner import Learner
    from megatron_ext.rl.losses import build_loss

    model, ends = cases.make_model(tmp_path / "model"), []
    samples = range(len(cases.LENGTHS))
    for offload in (False, True):
        config = cases.make_config(cases.ONE, dtype, OptimConfig(lr=1e-2, offload=offload))
        learner = Learner(config, model, total_updates=5)
        batch = cases.make_batch(torch.float32)
        batch.old_logp = batch.old_logp - 3.0
        weights_B, loss = cases.aggregation_weights("token_mean", samples), build_loss("ce_gppo")
        for _ in range(2):
            learner.update(batch, samples, weights_B, loss)
            if offload:
                held = torch.cuda.memory_allocated()
                learner.reload(optimizer=True)
                assert torch.cuda.memory_allocated() > held
                learner.offload(weights=True)
                assert torch.cuda.memory_allocated() < held
                learner.reload()
        ends.append({name: tensor.cpu().clone() for name, tensor in learner.export()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
