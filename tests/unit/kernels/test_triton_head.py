"""The Triton kernels of the head, in Triton's interpreter, against float64 and torch's own operations.

Needs Triton (Python 3.12's torch brings it; elsewhere `pip install .[bench]`), no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels import VocabShard, linear_statistics, linear_vocab_statistics, vocab_statistics
from megatron_ext.kernels.vocab_statistics import _rescale, combine

pytest.importorskip("triton")
triton_head = pytest.importorskip("megatron_ext.kernels.triton_head")
if not triton_head.INTERPRETED:
    pytest.skip("a GPU is here: tests/gpu runs the compiled kernels", allow_module_level=True)

FIELDS = ("logp", "entropy", "sum_p2", "sum_p2_logp")
TOKENS, HIDDEN = 7, 6


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_statistics, "_triton_kernels", lambda: triton_head)
    monkeypatch.setattr(triton_head, "_SUM_BLOCK", 64)  # several iterations of the loop over columns


def case(vocab: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64) * 1.5
    weight = torch.randn(vocab, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (TOKENS,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def gradients(stats: Any, leaves: list[Tensor], entropy: float = 0.3) -> tuple[Tensor, ...]:
    weight_T = torch.linspace(-1, 2, len(stats.logp), dtype=stats.logp.dtype)
    loss = (weight_T * stats.logp).sum()
    return torch.autograd.grad(loss - entropy * (weight_T.square() * stats.entropy).sum() if entropy else loss, leaves)


@pytest.mark.parametrize("keep_bytes", [0, 10**9])
@pytest.mark.parametrize("chunk_tokens", [0, 2])
@pytest.mark.parametrize("vocab", [1, 37, 300])
def test_values_and_gradients_equal_autograd_in_float64(vocab: int, chunk_tokens: int, keep_bytes: int) -> None:
    hidden, weight, targets = case(vocab)
    got = linear_vocab_statistics(hidden, weight, targets, chunk_tokens=chunk_tokens, keep_bytes=keep_bytes)
    logp_TV = (hidden @ weight.T).log_softmax(-1)
    p_TV = logp_TV.exp()
    expected = type(got)(
        logp_TV.gather(1, targets[:, None]).squeeze(1),
        -(p_TV * logp_TV).sum(-1),
        p_TV.square().sum(-1),
        (p_TV.square() * logp_TV).sum(-1),
    )
    for name in FIELDS:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-12, atol=1e-13)
    for entropy in (0.0, 0.3):
        mine, theirs = gradients(got, [hidden, weight], entropy), None
        got = linear_vocab_statistics(hidden, weight, targets, chunk_tokens=chunk_tokens, keep_bytes=keep_bytes)
        theirs = torch.autograd.grad(_loss(expected, entropy), [hidden, weight], retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def _loss(stats: Any, entropy: float) -> Tensor:
    weight_T = torch.linspace(-1, 2, len(stats.logp), dtype=stats.logp.dtype)
    return (weight_T * stats.logp).sum() - entropy * (weight_T.square() * stats.entropy).sum()


def test_bfloat16_logits_and_float32_sums() -> None:
    """Against the exact statistics of the rounded logits."""
    hidden, weight, targets = case(300, torch.bfloat16)
    got = linear_vocab_statistics(hidden, weight, targets, chunk_tokens=3)
    expected = vocab_statistics((hidden @ weight.T).detach().double(), targets)
    for name in FIELDS:
        assert getattr(got, name).dtype == torch.float32
        torch.testing.assert_close(getattr(got, name).double(), getattr(expected, name), rtol=3e-6, atol=3e-6)
    logits = (hidden @ weight.T).detach().requires_grad_()
    (of_logits,) = gradients(vocab_statistics(logits, targets), [logits])
    layer = torch.autograd.grad(hidden @ weight.T, [hidden, weight], of_logits)
    for mine, theirs in zip(gradients(got, [hidden, weight]), layer, strict=True):
        scale = float(theirs.float().abs().max())
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0, atol=2 * torch.finfo(mine.dtype).eps * scale)


def test_two_shards_of_a_vocabulary_with_padding() -> None:
    """Each shard's sums, combined by hand as across ranks, and the gradient of its columns."""
    hidden, weight, targets = case(90)
    whole = linear_vocab_statistics(hidden, weight, targets)
    expected = gradients(whole, [hidden, weight])
    parts: list[Any] = []
    for start, size in ((0, 50), (50, 40)):
        rows = torch.cat([weight.detach()[start : start + size], torch.full((3, HIDDEN), 9.0, dtype=torch.float64)])
        top, sums = torch.full((TOKENS,), -torch.inf, dtype=torch.float64), torch.zeros(5, TOKENS, dtype=torch.float64)
        target, owned = torch.zeros_like(top), torch.zeros_like(top)
        logits = hidden.detach() @ rows[:size].T
        triton_head.add_sums(logits, targets, start, top, sums, target, owned)
        parts.append((start, size, rows, top, sums, target, owned))
    top = torch.maximum(parts[0][3], parts[1][3])

    def as_shard(index: int) -> tuple[Any, ...]:
        start, size, _, mine, sums, target, owned = parts[index]
        other = parts[1 - index]
        shift = (other[3] - top).clamp(min=-1e4)
        rest = torch.cat([_rescale(other[4], shift), torch.stack([other[5], other[6]])])
        shard = VocabShard(start, size, lambda x: x + rest, lambda _: top)
        return combine(mine, sums, target, owned, shard)

    weight_T = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    for index, (start, size, _, *_rest) in enumerate(parts):
        stats, top_T, log_z_T = as_shard(index)
        for mine, name in zip(stats, FIELDS, strict=True):
            torch.testing.assert_close(mine, getattr(whole, name).detach(), rtol=1e-12, atol=1e-13)
        logits = hidden.detach() @ weight.detach()[start : start + size].T
        incoming = (top_T, log_z_T, stats[1], weight_T, -0.3 * weight_T.square())
        triton_head.write_gradient(logits, logits, targets, start, incoming)
        torch.testing.assert_close(
            logits.T @ hidden.detach(), expected[1][start : start + size], rtol=1e-11, atol=1e-12
        )


def test_impossible_tokens_and_nan() -> None:
    """-inf in a whole block, then in all later blocks; a NaN propagates."""
    rows = [float("-inf"), float("-inf"), 0.5, 1.5, float("-inf"), float("-inf")]
    hidden = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(rows, dtype=torch.float64)[:, None].requires_grad_()
    targets = torch.tensor([2, 3, 0])
    expected = vocab_statistics((hidden @ weight.T).detach(), targets)
    got = linear_vocab_statistics(hidden, weight, targets, chunk_tokens=1)
    for name in FIELDS:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-14, atol=0)
    (of_weight,) = torch.autograd.grad(got.entropy.sum(), weight)
    assert torch.isfinite(of_weight).all() and (of_weight[[0, 1, 4, 5]] == 0).all()
    broken = torch.ones(3, 1, dtype=torch.float64)
    broken[1] = float("nan")
    stats = linear_vocab_statistics(broken, torch.ones(70, 1, dtype=torch.float64), targets)
    assert stats.logp.isnan().tolist() == stats.entropy.isnan().tolist() == [False, True, False]
