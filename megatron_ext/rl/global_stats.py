"""Statistics and selections over the tokens of *all* ranks, independent of the sharding of the tokens.

Other trainers select tokens per micro-batch, so the selected set changes with the micro-batch size. Here every quantity
is a function of the multiset of tokens: sums are exact (fixed point), ranks are global with ties broken by
(sequence id, position), random numbers are a hash of (seed, step, sequence id, position).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Reduce(Protocol):
    """Collectives over a process group whose ranks hold disjoint sets of tokens."""

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the ranks, int64 or float64, same shape on each."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """The 1-D tensors of all ranks, of any lengths, concatenated in an order that is the same for every call."""
        ...


class Local:
    """A single rank."""

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, values: Tensor) -> Tensor:
        return values


def exact_sum(values: Tensor, reduce: Reduce) -> Tensor:
    """Sum over all ranks, float64 scalar, bit for bit the same in any order and for any sharding.

    Values are split into multiples of 2^-20 and of 2^-54 and summed as int64: exact to 2^-55 per value (float64's own
    precision at 1/8) while |sum| < 8e12 and there are fewer than 5e8 tokens per rank.
    """
    scaled = values.double() * 2.0**20
    high = scaled.floor()
    low = ((scaled - high) * 2.0**34).round()
    parts = reduce.sum(torch.stack([high, low]).to(torch.int64).sum(dim=1)).double()
    return parts[0] * 2.0**-20 + parts[1] * 2.0**-54


def global_count(mask: Tensor, reduce: Reduce) -> int:
    """Number of True tokens over all ranks."""
    return int(reduce.sum(mask.sum().reshape(1)))


def global_mean_std(values: Tensor, mask: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Mean and *population* standard deviation over the masked tokens of all ranks, float64 scalars; 0, 0 if none."""
    n = max(global_count(mask, reduce), 1)
    kept = values.double()[mask]
    mean = exact_sum(kept, reduce) / n
    return mean, (exact_sum((kept - mean).square(), reduce) / n).sqrt()


def global_top_k(
    score: Tensor, candidates: Tensor, seq_ids: Tensor, positions: Tensor, k: int, reduce: Reduce
) -> Tensor:
    """Bool (T,): the k candidates with the highest score over all ranks; ties go to the lower (seq_id, position).

    Each rank sends only its own best k, so a small k costs little communication.
    """
    keys = (score, seq_ids, positions)
    best = candidates.nonzero().squeeze(1)
    best = best[_ranked(*(t[best] for t in keys))[:k]]
    everyone = [reduce.gather(t[best]) for t in keys]
    winners = _ranked(*everyone)[:k]
    if winners.numel() == 0:
        return torch.zeros_like(candidates)
    last_score, last_seq, last_position = (t[winners[-1]] for t in everyone)
    earlier = (seq_ids < last_seq) | ((seq_ids == last_seq) & (positions <= last_position))
    return candidates & ((score > last_score) | ((score == last_score) & earlier))


def _ranked(score: Tensor, seq_ids: Tensor, positions: Tensor) -> Tensor:
    """Indices by falling score, then rising (seq_id, position)."""
    order = torch.argsort(positions, stable=True)
    order = order[torch.argsort(seq_ids[order], stable=True)]
    return order[torch.argsort(score[order], descending=True, stable=True)]


def random_keys(seed: int, step: int, seq_ids: Tensor, positions: Tensor) -> Tensor:
    """int64 (T,) hash of (seed, step, seq_id, position): random numbers without a generator state to restore."""
    key = _splitmix64(torch.full_like(seq_ids, seed))
    for counter in (torch.full_like(seq_ids, step), seq_ids, positions.to(seq_ids.dtype)):
        key = _splitmix64(key ^ counter)
    return key


def _splitmix64(x: Tensor) -> Tensor:
    """The SplitMix64 mix (Steele et al. 2014) in wrapping int64 arithmetic: a bijection of 64 bits."""
    x = x + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    return x ^ _shift_right(x, 31)


def _signed(word: int) -> int:
    """An unsigned 64-bit constant as the int64 with the same bits."""
    return word - 2**64 if word >= 2**63 else word


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
