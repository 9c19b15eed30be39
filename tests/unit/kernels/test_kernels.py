"""Vocabulary statistics: textbook formulas in float64, bounds, and absence of side effects."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels import VocabShard, vocab_statistics
from megatron_ext.rl.types import TokenStats

FIELDS = ("logp", "entropy", "sum_p2", "sum_p2_logp")


def reference(logits_TV: Tensor, targets_T: Tensor) -> TokenStats:
    """The definitions, by log_softmax and autograd, in the dtype of the logits."""
    logp_TV = logits_TV.log_softmax(dim=-1)
    p_TV = logp_TV.exp()
    plogp_TV = torch.where(p_TV > 0, p_TV * logp_TV, torch.zeros_like(p_TV))
    return TokenStats(
        logp=logp_TV.gather(1, targets_T[:, None]).squeeze(1),
        entropy=-plogp_TV.sum(-1),
        sum_p2=p_TV.square().sum(-1),
        sum_p2_logp=(p_TV * plogp_TV).sum(-1),
    )


def random_case(tokens: int, vocab: int, *, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * scale
    return logits, torch.randint(vocab, (tokens,), generator=generator)


@pytest.mark.parametrize("chunk_tokens", [0, 1, 3, 17, 100])
@pytest.mark.parametrize("vocab", [1, 2, 37])
def test_values_in_float64(vocab: int, chunk_tokens: int) -> None:
    logits, targets = random_case(17, vocab)
    got, expected = vocab_statistics(logits, targets, chunk_tokens=chunk_tokens), reference(logits, targets)
    for name in FIELDS:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("chunk_tokens", [0, 1, 5])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.3, -0.7)])
def test_gradients_in_float64(weights: tuple[float, float], chunk_tokens: int) -> None:
    """Against autograd through log_softmax, with a different weight on every token."""
    logits, targets = random_case(11, 29)
    grad_T = torch.linspace(-1, 2, 11, dtype=torch.float64)

    def gradient(stats: TokenStats, leaf: Tensor) -> Tensor:
        total = (weights[0] * grad_T * stats.logp + weights[1] * grad_T.square() * stats.entropy).sum()
        return torch.autograd.grad(total, leaf)[0]

    leaf = logits.clone().requires_grad_()
    got = gradient(vocab_statistics(leaf, targets, chunk_tokens=chunk_tokens), leaf)
    torch.testing.assert_close(got, gradient(reference(leaf, targets), leaf), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("which", ["logp", "entropy"])
def test_gradient_of_one_output_alone(which: str) -> None:
    """The other output is not used, so its incoming gradient is None instead of zero."""
    logits, targets = random_case(4, 9)
    leaf = logits.clone().requires_grad_()
    got = torch.autograd.grad(getattr(vocab_statistics(leaf, targets), which).sum(), leaf)[0]
    expected = torch.autograd.grad(getattr(reference(leaf, targets), which).sum(), leaf)[0]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_second_moments_carry_no_gradient_and_double_backward_is_refused() -> None:
    logits, targets = random_case(4, 9)
    leaf = logits.requires_grad_()
    stats = vocab_statistics(leaf, targets)
    assert stats.logp.requires_grad and stats.entropy.requires_grad
    assert not stats.sum_p2.requires_grad and not stats.sum_p2_logp.requires_grad
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad((weight * stats.logp).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_accumulate_in_float32(dtype: torch.dtype) -> None:
    """Only the logits are rounded: sums of 30 000 have float32 errors, not the 3 digits of bfloat16."""
    logits, targets = random_case(6, 30_000, scale=2.0)
    logits = logits.to(dtype)
    got, exact = vocab_statistics(logits, targets), reference(logits.double(), targets)
    for name in FIELDS:
        assert getattr(got, name).dtype == torch.float32
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradient_is_the_rounded_exact_one(dtype: torch.dtype) -> None:
    logits, targets = random_case(5, 400)
    leaf = logits.to(dtype).requires_grad_()
    stats = vocab_statistics(leaf, targets, chunk_tokens=2)
    (got,) = torch.autograd.grad((stats.logp + 0.1 * stats.entropy).sum(), leaf)
    exact_leaf = leaf.detach().double().requires_grad_()
    exact = reference(exact_leaf, targets)
    (expected,) = torch.autograd.grad((exact.logp + 0.1 * exact.entropy).sum(), exact_leaf)
    assert got.dtype == dtype
    rounding = torch.finfo(dtype).eps  # of a stored value; twice the unit roundoff, as a margin for float32 sums
    torch.testing.assert_close(got.double(), expected, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [2, 3, 32, 151_936])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 100.0, 1e4])
def test_bounds_hold(scale: float, vocab: int, dtype: torch.dtype) -> None:
    """logp <= 0 and 0 <= H <= ln V exactly, uniform and one-hot distributions included."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(4, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)
    stats = vocab_statistics(logits, logits.argmax(-1))
    assert (stats.logp <= 0).all() and torch.isfinite(stats.logp).all()
    assert all(0 <= h <= math.log(vocab) for h in stats.entropy.double().tolist())
    assert (stats.sum_p2 > 0).all() and (stats.sum_p2 <= 1 + 1e-6).all()
    assert (stats.sum_p2_logp <= 0).all()


def test_extreme_logits_are_finite() -> None:
    """+-1e4 and masked entries: closed-form values, and a gradient without NaN."""
    inf = float("inf")
    rows = [[1e4, -1e4, 0.0, -inf], [-1e4, -1e4, -inf, -inf], [1e4, 1e4, 1e4, 1e4], [-inf, -inf, 3.0, -inf]]
    leaf = torch.tensor(rows, requires_grad=True)
    stats = vocab_statistics(leaf, torch.tensor([1, 0, 3, 2]))
    torch.testing.assert_close(stats.logp, torch.tensor([-2e4, -math.log(2), -math.log(4), 0.0]))
    torch.testing.assert_close(stats.entropy, torch.tensor([0.0, math.log(2), math.log(4), 0.0]))
    torch.testing.assert_close(stats.sum_p2, torch.tensor([1.0, 0.5, 0.25, 1.0]))
    torch.testing.assert_close(stats.sum_p2_logp, torch.tensor([0.0, -math.log(2) / 2, -math.log(4) / 4, 0.0]))
    (grad,) = torch.autograd.grad((stats.logp + stats.entropy).sum(), leaf)
    expected = torch.tensor([[-1, 1, 0, 0], [0.5, -0.5, 0, 0], [-0.25, -0.25, -0.25, 0.75], [0, 0, 0, 0]])
    torch.testing.assert_close(grad, expected)


def test_a_nan_logit_is_not_hidden() -> None:
    stats = vocab_statistics(torch.tensor([[0.0, float("nan")], [0.0, 1.0]]), torch.tensor([0, 1]))
    assert stats.logp.isnan().tolist() == [True, False]
    assert stats.entropy.isnan().tolist() == [True, False]


def test_the_input_is_never_written_to() -> None:
    """Non-contiguous logits (Megatron yields sequence-first views) give the same result."""
    logits, targets = random_case(12, 7)
    kept = logits.clone()
    view = logits.t().contiguous().t().requires_grad_()
    assert not view.is_contiguous()
    stats = vocab_statistics(view, targets, chunk_tokens=5)
    (stats.logp + stats.entropy).sum().backward()
    assert torch.equal(view.detach(), kept)
    torch.testing.assert_close(stats.logp, reference(logits, targets).logp, rtol=1e-13, atol=1e-14)


def test_padding_columns_take_no_part_and_get_no_gradient() -> None:
    logits, targets = random_case(5, 10)
    padded = torch.cat([logits, torch.full((5, 6), 50.0, dtype=torch.float64)], dim=1).requires_grad_()
    shard = VocabShard(start=0, size=10, all_reduce_sum=lambda x: x, all_reduce_max=lambda x: x)
    stats, expected = vocab_statistics(padded, targets, shard=shard), reference(logits, targets)
    for name in FIELDS:
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=1e-13, atol=1e-14)
    (grad,) = torch.autograd.grad(stats.logp.sum(), padded)
    assert (grad[:, 10:] == 0).all()
    assert (grad[:, :10] != 0).all()


@pytest.mark.parametrize("target", [-1, 10, 15])
def test_a_target_outside_the_vocabulary_is_nan(target: int) -> None:
    """Also a target in the padding."""
    logits = torch.zeros(1, 16)
    shard = VocabShard(start=0, size=10, all_reduce_sum=lambda x: x, all_reduce_max=lambda x: x)
    assert vocab_statistics(logits, torch.tensor([target]), shard=shard).logp.isnan().all()


def test_collectives_do_not_depend_on_the_chunks() -> None:
    """One maximum and one sum, whatever the chunk size: all ranks must call the same number of collectives."""
    calls: list[str] = []

    def spy(name: str, x: Tensor) -> Tensor:
        calls.append(name)
        return x

    shard = VocabShard(0, 7, lambda x: spy("sum", x), lambda x: spy("max", x))
    logits, targets = random_case(12, 7)
    stats = vocab_statistics(logits.requires_grad_(), targets, shard=shard, chunk_tokens=2)
    stats.logp.sum().backward()
    assert calls == ["max", "sum"]


def test_no_tokens() -> None:
    leaf = torch.zeros(0, 5, requires_grad=True)
    stats = vocab_statistics(leaf, torch.zeros(0, dtype=torch.int64))
    assert stats.logp.shape == stats.sum_p2_logp.shape == (0,)
    assert torch.autograd.grad(stats.logp.sum(), leaf)[0].shape == (0, 5)


@pytest.mark.parametrize(
    ("logits", "targets", "kwargs", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), {}, r"shape \(3,\)"),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), {}, r"targets of shape \(2,\)"),
        (torch.zeros(3, 4), torch.zeros(3), {}, "int64 targets"),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), {}, "floating logits"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), {"chunk_tokens": -1}, "chunk_tokens=-1"),
        (
            torch.zeros(3, 4),
            torch.zeros(3, dtype=torch.int64),
            {"shard": VocabShard(0, 5, lambda x: x, lambda x: x)},
            "shard.size=5",
        ),
    ],
)
def test_what_does_not_fit_is_refused(logits: Tensor, targets: Tensor, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocab_statistics(logits, targets, **kwargs)


def test_no_further_tensor_of_full_size_lives() -> None:
    """Peak of tensor memory in forward and backward, by torch's own profiler: gradient plus a chunk, no copy."""
    tokens, vocab = 256, 2048
    leaf = torch.zeros(tokens, vocab, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    full = tokens * vocab * 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        stats = vocab_statistics(leaf, targets, chunk_tokens=8)
        (stats.logp + stats.entropy).sum().backward()
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    assert full <= peak < 1.25 * full
