"""The learner on a GPU against transformers on the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.15)])
def test_log_probabilities_equal_transformers(tmp_path: Path, dtype: str, tolerance: float) -> None:
    """Mean difference in nats, over response tokens of ragged packed sequences."""
    from transformers import AutoModelForCausalLM

    from megatron_ext.learner.learner import Learner
    from megatron_ext.learner.model import distributed
    from recipes.checks.settings import load_checked
    from recipes.models.prepare import make_tiny_model
    from recipes.models.warm_start import demonstration_batch

    model_dir = make_tiny_model(tmp_path / "model", 0)
    pairs = [([1, 5, 6, 7], [8, 9, 10]), ([1, 9], [4]), ([1, 5, 6, 7, 8], [9, 10, 11, 12, 13])]
    config = load_checked(["recipe=quickstart", f"model.path={model_dir}", f"model.dtype={dtype}"])
    with distributed(config.parallel, 0, alone=True):
        stats = Learner(config, model_dir, total_updates=1).statistics(demonstration_batch(pairs))
    oracle = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).cuda()
    expected = []
    for prompt, response in pairs:
        logp = oracle(torch.tensor([prompt + response], device="cuda")).logits[0].log_softmax(-1)
        expected += [float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(response)]
    assert float((stats.logp - torch.tensor(expected)).abs().mean()) < tolerance
    assert bool((stats.logp <= 0).all()) and bool((stats.entropy >= 0).all())
