"""Drawing tokens in this process: top-k and top-p against the definition."""

from __future__ import annotations

import pytest
import torch

from recipes.rollout.engine import Sampling
from recipes.rollout.local import sample


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(0, 1.0, 5), (2, 1.0, 2), (1, 1.0, 1), (9, 1.0, 5), (3, 0.6, 2)])
def test_only_the_most_probable_tokens_are_drawn(top_k: int, top_p: float, kept: int) -> None:
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    sampling = Sampling(1, top_k=top_k, top_p=top_p, allow_off_policy_sampling=True)
    uniform = torch.linspace(0, 1 - 1e-9, 2001, dtype=torch.float64)
    tokens, logprobs = sample(p.log().expand(2001, 5).clone(), uniform, sampling)
    allowed = p.argsort(descending=True)[:kept]
    expected = torch.zeros(5).index_put((allowed,), p[allowed] / p[allowed].sum())
    torch.testing.assert_close(torch.bincount(tokens, minlength=5) / 2001, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(logprobs, expected[tokens].log())


def test_training_refuses_top_k() -> None:
    with pytest.raises(ValueError, match="top_k=5: sampling for training"):
        Sampling(1, top_k=5)
    with pytest.raises(ValueError, match="top_k=-1"):
        Sampling(1, top_k=-1, allow_off_policy_sampling=True)
