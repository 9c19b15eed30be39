"""Vocabulary statistics over real tensor-parallel ranks (gloo) equal the single-rank float64 result."""

from __future__ import annotations

from pathlib import Path

import gloo
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.kernels import linear_vocab_statistics, vocab_statistics
from megatron_ext.rl.types import TokenStats

pytestmark = pytest.mark.distributed

FIELDS = ("logp", "entropy", "sum_p2", "sum_p2_logp")
TOKENS = 23


def _textbook(logits_TV: Tensor, targets_T: Tensor) -> TokenStats:
    logp_TV = logits_TV.log_softmax(-1)
    p_TV = logp_TV.exp()
    return TokenStats(
        logp_TV.gather(1, targets_T[:, None]).squeeze(1),
        -(p_TV * logp_TV).sum(-1),
        p_TV.square().sum(-1),
        (p_TV.square() * logp_TV).sum(-1),
    )


def _gradient(stats: TokenStats, leaf: Tensor) -> Tensor:
    """Gradient of both outputs, weighted per token as for a loss with an entropy bonus; equal on all ranks."""
    weight_T = torch.linspace(-1, 2, TOKENS, dtype=stats.logp.dtype)
    (grad,) = torch.autograd.grad((weight_T * stats.logp - 0.3 * weight_T.square() * stats.entropy).sum(), leaf)
    return grad


def _check(vocab: int, padded: int, chunk_tokens: int, scale: float) -> None:
    from megatron_ext.learner.vocab_parallel import tensor_parallel_shard

    generator = torch.Generator().manual_seed(vocab)
    whole = torch.randn(TOKENS, vocab, generator=generator, dtype=torch.float64) * scale
    targets = torch.randint(vocab, (TOKENS,), generator=generator)
    targets[:3] = torch.tensor([0, vocab - 1, vocab - 1])
    columns = padded // dist.get_world_size()
    whole[2, : min(columns, vocab - 1)] = float("-inf")  # so that the first rank has no possible token
    # In the reference -1e6 has the same effect as -inf, without 0 * inf.
    leaf = whole.clamp(min=-1e6).requires_grad_()
    expected = _textbook(leaf, targets)
    expected_grad = _gradient(expected, leaf)

    # Padding holds the largest logits, so that a leak is detected.
    start = dist.get_rank() * columns
    full = torch.cat([whole, torch.full((TOKENS, padded - vocab), 1e3, dtype=torch.float64)], dim=1)
    local = full[:, start : start + columns].clone().requires_grad_()
    shard = tensor_parallel_shard(vocab, padded)
    assert shard is not None
    got = vocab_statistics(local, targets, shard=shard, chunk_tokens=chunk_tokens)

    for name in FIELDS:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    padded_grad = torch.cat([expected_grad, torch.zeros(TOKENS, padded - vocab, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(_gradient(got, local), padded_grad[:, start : start + columns], rtol=1e-12, atol=1e-12)

    # Every rank must hold the same bits, or ranks of one model would select different tokens.
    for name in FIELDS:
        mine = getattr(got, name).detach().contiguous()
        first = mine.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(mine, first)

    low = vocab_statistics(local.detach().bfloat16(), targets, shard=shard)
    exact = _textbook(whole.bfloat16().double().clamp(min=-1e6), targets)
    for name in FIELDS:
        torch.testing.assert_close(getattr(low, name).double(), getattr(exact, name), rtol=2e-6, atol=2e-6)


def _check_linear(vocab: int, padded: int, chunk_tokens: int) -> None:
    """From hidden states: each rank has its rows of the output layer, and its part of the hidden states' gradient."""
    from megatron_ext.learner.vocab_parallel import tensor_parallel_shard

    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(TOKENS, 5, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocab, 5, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(vocab, (TOKENS,), generator=generator)
    expected = _textbook(hidden @ weight.T, targets)
    of_hidden, of_weight = _gradient(expected, hidden), _gradient(_textbook(hidden @ weight.T, targets), weight)

    rows = padded // dist.get_world_size()
    mine = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
    full = torch.cat([weight.detach(), torch.full((padded - vocab, 5), 1e3, dtype=torch.float64)])
    local = full[mine].clone().requires_grad_()
    shard = tensor_parallel_shard(vocab, padded)
    got = linear_vocab_statistics(hidden, local, targets, shard=shard, chunk_tokens=chunk_tokens)
    for name in FIELDS:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    weight_T = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    total = (weight_T * got.logp - 0.3 * weight_T.square() * got.entropy).sum()
    part, own = torch.autograd.grad(total, [hidden, local])
    dist.all_reduce(part)
    torch.testing.assert_close(part, of_hidden, rtol=1e-11, atol=1e-12)
    whole = torch.cat([of_weight, torch.zeros(padded - vocab, 5, dtype=torch.float64)])
    torch.testing.assert_close(own, whole[mine], rtol=1e-11, atol=1e-12)


def _process(rank: int, root: Path) -> None:
    for world, check in ((1, _single), (2, _several), (4, _several)):
        if rank < world:
            with gloo.group(rank, world, root / f"store-{world}"):
                check(world)
                (root / f"done-{world}-{rank}").touch()


def _several(world: int) -> None:
    from megatron_ext.learner import cpu

    cpu.enable()
    from megatron.core import parallel_state

    from megatron_ext.learner.vocab_parallel import tensor_parallel_shard

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    _check(vocab=32, padded=32, chunk_tokens=0, scale=3.0)
    _check(vocab=37, padded=40, chunk_tokens=5, scale=3.0)
    _check(vocab=9, padded=16, chunk_tokens=1, scale=200.0)  # the last ranks hold only padding
    _check_linear(vocab=37, padded=40, chunk_tokens=0)
    _check_linear(vocab=37, padded=40, chunk_tokens=1)
    _check_linear(vocab=9, padded=16, chunk_tokens=2)
    with pytest.raises(ValueError, match="padded_vocab_size=41"):
        tensor_parallel_shard(37, 41)
    with pytest.raises(ValueError, match="vocab_size=50"):
        tensor_parallel_shard(50, 48)
    parallel_state.destroy_model_parallel()


def _single(world: int) -> None:
    from megatron_ext.learner.vocab_parallel import tensor_parallel_shard

    group = dist.group.WORLD
    assert tensor_parallel_shard(40, 40, group=group) is None
    shard = tensor_parallel_shard(37, 40, group=group)
    assert shard is not None and (shard.start, shard.size) == (0, 37)


def test_statistics_and_gradients_equal_one_rank_and_one_needs_a_shard_only_for_padding(tmp_path: Path) -> None:
    """Two and four ranks, and one by itself, in four processes that are started once."""
    gloo.run(4, _process, tmp_path, timeout_s=300)
    assert len(list(tmp_path.glob("done-*"))) == 1 + 2 + 4
