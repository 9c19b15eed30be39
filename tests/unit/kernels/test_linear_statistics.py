"""Statistics from hidden states and output weights against autograd through the whole logits, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels import VocabShard, linear_vocab_statistics, vocab_statistics
from megatron_ext.kernels.linear_statistics import block_columns
from megatron_ext.rl.types import TokenStats

FIELDS = ("logp", "entropy", "sum_p2", "sum_p2_logp")
TOKENS, HIDDEN = 11, 6


def textbook(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> TokenStats:
    logp_TV = (hidden_TH @ weight_VH.T).log_softmax(-1)
    p_TV = logp_TV.exp()
    return TokenStats(
        logp_TV.gather(1, targets_T[:, None]).squeeze(1),
        -(p_TV * logp_TV).sum(-1),
        p_TV.square().sum(-1),
        (p_TV.square() * logp_TV).sum(-1),
    )


def case(vocab: int, *, scale: float = 1.5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocab, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (TOKENS,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def gradients(stats: TokenStats, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of both outputs, with a different weight on every token."""
    weight_T = torch.linspace(-1, 2, len(stats.logp), dtype=stats.logp.dtype)
    return torch.autograd.grad((weight_T * stats.logp - 0.3 * weight_T.square() * stats.entropy).sum(), leaves)


@pytest.mark.parametrize("keep_bytes", [0, 10**9])
@pytest.mark.parametrize("chunk_tokens", [0, 1, 2, 5, 11, 400])
@pytest.mark.parametrize("vocab", [1, 2, 37, 1000])
def test_values_and_gradients_equal_those_through_whole_logits(vocab: int, chunk_tokens: int, keep_bytes: int) -> None:
    hidden, weight, targets = case(vocab)
    got = linear_vocab_statistics(hidden, weight, targets, chunk_tokens=chunk_tokens, keep_bytes=keep_bytes)
    expected = textbook(hidden, weight, targets)
    for name in FIELDS:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-12, atol=1e-13)
    for mine, theirs in zip(gradients(got, [hidden, weight]), gradients(expected, [hidden, weight]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_kept_logits_are_used_once() -> None:
    """Their gradient overwrites them; a second backward recomputes them."""
    hidden, weight, targets = case(37)
    got = linear_vocab_statistics(hidden, weight, targets, keep_bytes=11 * 37 * 8)
    first, second = (torch.autograd.grad(got.logp.sum(), [hidden, weight], retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_block_holds_what_the_workspace_allows() -> None:
    cpu = torch.device("cpu")
    assert block_columns(100, 5000, 20, cpu) == 1000 - 1000 % 128  # 20 tokens' logits are 1000 columns of 100 rows
    assert block_columns(100, 5000, 1, cpu) == 50 and block_columns(10_000, 5000, 1, cpu) == 1
    assert block_columns(100, 5000, 100, cpu) == block_columns(0, 5000, 1, cpu) == 5000
    assert block_columns(100, 0, 3, cpu) == 0


@pytest.mark.parametrize("chunk_tokens", [0, 1, 3])
def test_padding_takes_no_part_and_gets_no_gradient(chunk_tokens: int) -> None:
    """The padding has the largest logits of all, and one row of its weight is NaN."""
    hidden, weight, targets = case(10)
    padded = torch.cat([weight.detach(), torch.full((6, HIDDEN), 50.0, dtype=torch.float64)])
    padded[-1] = float("nan")
    padded.requires_grad_()
    shard = VocabShard(0, 10, lambda x: x, lambda x: x)
    got = linear_vocab_statistics(hidden, padded, targets, shard=shard, chunk_tokens=chunk_tokens)
    expected = gradients(textbook(hidden, weight, targets), [hidden, weight])
    of_hidden, of_weight = gradients(got, [hidden, padded])
    torch.testing.assert_close(of_hidden, expected[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(of_weight[:10], expected[1], rtol=1e-11, atol=1e-12)
    assert (of_weight[10:] == 0).all()


def test_no_tokens_give_zero_gradients() -> None:
    """A micro-batch of padding only still participates in the reduction of gradients."""
    hidden, weight, _ = case(9)
    stats = linear_vocab_statistics(hidden[:0], weight, torch.zeros(0, dtype=torch.int64))
    assert stats.logp.shape == stats.sum_p2_logp.shape == (0,)
    of_hidden, of_weight = torch.autograd.grad(stats.logp.sum(), [hidden, weight])
    assert (of_hidden == 0).all() and (of_weight == 0).all() and of_weight.shape == weight.shape


def test_a_block_of_impossible_tokens() -> None:
    """-inf logits in a whole block, or in all later blocks, do not affect the result."""
    hidden = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    rows = [float("-inf"), float("-inf"), 0.5, 1.5, float("-inf"), float("-inf")]
    weight = torch.tensor(rows, dtype=torch.float64)[:, None].requires_grad_()
    targets = torch.tensor([2, 3, 0])
    expected = vocab_statistics((hidden @ weight.T).detach(), targets)
    for chunk_tokens in (1, 2):  # two, and four columns in a block
        got = linear_vocab_statistics(hidden, weight, targets, chunk_tokens=chunk_tokens)
        for name in FIELDS:
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-14, atol=0)
        assert float(got.logp[2]) == float("-inf") and torch.isfinite(got.entropy).all()
        (of_weight,) = torch.autograd.grad(got.entropy.sum(), weight)
        assert torch.isfinite(of_weight).all() and (of_weight[[0, 1, 4, 5]] == 0).all()


def test_a_nan_is_not_hidden() -> None:
    hidden, weight, targets = case(8)
    broken = hidden.detach().clone()
    broken[4, 0] = float("nan")
    for chunk_tokens in (0, 1):
        stats = linear_vocab_statistics(broken, weight, targets, chunk_tokens=chunk_tokens)
        assert stats.logp.isnan().nonzero().tolist() == stats.entropy.isnan().nonzero().tolist() == [[4]]


@pytest.mark.parametrize("keep_bytes", [0, 10**9])
@pytest.mark.parametrize("chunk_tokens", [0, 2])
def test_bfloat16_products_and_float32_statistics(chunk_tokens: int, keep_bytes: int) -> None:
    """Against the exact statistics of the rounded logits; the gradient is that of a bfloat16 output layer."""
    hidden, weight, targets = case(300, dtype=torch.bfloat16)
    got = linear_vocab_statistics(hidden, weight, targets, chunk_tokens=chunk_tokens, keep_bytes=keep_bytes)
    logits = (hidden @ weight.T).detach().requires_grad_()
    expected = vocab_statistics(logits.double(), targets)
    for name in FIELDS:
        assert getattr(got, name).dtype == torch.float32
        torch.testing.assert_close(getattr(got, name).double(), getattr(expected, name), rtol=2e-6, atol=2e-6)
    (of_logits,) = gradients(vocab_statistics(logits, targets), [logits])
    layer = torch.autograd.grad(hidden @ weight.T, [hidden, weight], of_logits)
    for mine, theirs in zip(gradients(got, [hidden, weight]), layer, strict=True):
        assert mine.dtype == torch.bfloat16
        scale = float(theirs.float().abs().max())
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0, atol=2 * torch.finfo(mine.dtype).eps * scale)


def test_only_what_is_asked_for_is_computed() -> None:
    """For a frozen output layer, and for a pass without gradients."""
    hidden, weight, targets = case(20)
    expected = gradients(textbook(hidden, weight, targets), [hidden])
    got = linear_vocab_statistics(hidden, weight.detach(), targets)
    torch.testing.assert_close(gradients(got, [hidden])[0], expected[0], rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        assert not linear_vocab_statistics(hidden, weight, targets).logp.requires_grad


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "message"),
    [
        ((3, 4), (5, 6), torch.int64, r"weight of shape \(5, 6\)"),
        ((3, 4), (5, 4), torch.float32, "int64"),
        ((2, 4), (5, 4), torch.int64, "for 2 hidden states"),
    ],
)
def test_what_does_not_fit_is_refused(
    hidden: tuple[int, int], weight: tuple[int, int], targets: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_vocab_statistics(torch.zeros(hidden), torch.zeros(weight), torch.zeros(3, dtype=targets))


def test_mixed_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="one floating dtype"):
        linear_vocab_statistics(torch.zeros(1, 2), torch.zeros(3, 2).bfloat16(), torch.zeros(1, dtype=torch.int64))


def test_the_logits_are_never_whole() -> None:
    """Peak of tensor memory in forward and backward, by torch's own profiler: far below the logits."""
    tokens, vocab, hidden_size = 256, 8192, 16
    hidden = torch.zeros(tokens, hidden_size, requires_grad=True)
    weight = torch.zeros(vocab, hidden_size, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        stats = linear_vocab_statistics(hidden, weight, targets, chunk_tokens=16)
        (stats.logp + stats.entropy).sum().backward()
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    chunk, gradients_only = 16 * vocab * 4, 4 * hidden_size * (vocab + tokens)
    assert gradients_only <= peak < gradients_only + 4 * chunk < 0.4 * tokens * vocab * 4
