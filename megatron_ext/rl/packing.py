"""Distribution of samples over ranks and micro-batches, and the packed (THD) tensors of one micro-batch.

Pure: torch only. Shapes: T response tokens of the whole batch in *sample order* (sample 0's first), R response tokens
of one micro-batch in packed order, M tokens of a packed micro-batch, padding included.

The model gets the first P + L - 1 tokens of a sample of P prompt and L response tokens. The last response token is
only a target; the output at its position would not be used. So every input position has a true next token.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch of whole sequences end to end, in the format of `PackedSeqParams(qkv_format="thd")`.

    Padding of the whole batch is one more segment of ``cu_seqlens`` after the samples; padding of a sequence is at the
    end of its segment. No sample attends to either. A batch without samples is only padding.
    """

    tokens_M: Tensor  # int64, input of the model
    targets_M: Tensor  # int64, the next token of the same sequence; pad_id on padding
    position_ids_M: Tensor  # int64, restart at 0 in every segment
    cu_seqlens: Tensor  # int32, (segments + 1,), 0 first, M last; padding included
    max_seqlen: int  # longest segment
    response_mask_M: Tensor  # bool, True where the *target* is a response token
    seq_index_M: Tensor  # int64, index into the pairs given to `collate`; -1 on padding
    response_pos_M: Tensor  # int64, index of the target within its response; -1 where it is not a response token

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on ``device``."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "max_seqlen"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def fed_length(prompt_length: int, response_length: int) -> int:
    """Tokens that `collate` feeds for one sample: the unit of `plan`'s ``lengths`` and ``token_budget``."""
    return prompt_length + response_length - 1


def attention_cost(hidden_size: int) -> Callable[[int], float]:
    """Relative forward cost of a sequence in a decoder of this width: ``n + n^2 / (12 hidden)``, in token units.

    Per layer the projections and a 4x MLP cost 24 h^2 FLOPs a token, causal attention 2 h n.
    """
    return lambda n: n + n * n / (12.0 * hidden_size)


def plan(
    lengths: Sequence[int],
    *,
    dp_size: int,
    token_budget: int,
    micro_batch_multiple: int = 1,
    cost: Callable[[int], float] | None = None,
    oversize: Literal["own", "raise"] = "own",
) -> list[list[list[int]]]:
    """Distribute samples over ranks and micro-batches. A pure function of its arguments; ties go to the lower index.

    Best-fit decreasing gives the smallest number of micro-batches, rounded up to the required multiple. The samples are
    then assigned in order of falling cost, each to the cheapest micro-batch with room, and micro-batches to ranks in
    the same way. Within a rank the costliest comes first, so that a memory problem shows at once.

    Args:
        lengths: fed tokens of every sample (`fed_length`), all >= 1.
        dp_size: data-parallel ranks.
        token_budget: most tokens of a micro-batch, before padding.
        micro_batch_multiple: the number of micro-batches per rank is a multiple of it (interleaved pipelines need it).
        cost: time of a sequence by its length, in any unit; by default `attention_cost(2048)`.
        oversize: a sample beyond the budget gets a micro-batch of its own, or raises.

    Returns:
        Sample indices by [rank][micro-batch]. Every sample occurs once, and every rank has the same number of
        micro-batches, at least one; some are empty if there are too few samples (`collate` takes an empty one).

    Raises:
        ValueError: for sizes below 1, and for a sample beyond the budget if ``oversize="raise"``.
    """
    for name, value in (("dp_size", dp_size), ("token_budget", token_budget)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if micro_batch_multiple < 1:
        raise ValueError(f"micro_batch_multiple={micro_batch_multiple} must be at least 1")
    if min(lengths, default=1) < 1:
        raise ValueError(f"a sample of length {min(lengths)} cannot be packed: drop empty sequences first")
    longest = max(lengths, default=0)
    if oversize == "raise" and longest > token_budget:
        raise ValueError(f"a sample of {longest} tokens exceeds token_budget={token_budget}: raise it or drop it")

    costs = [(cost or attention_cost(2048))(n) for n in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-costs[i], i))
    tight = _best_fit(lengths, token_budget)
    step = dp_size * micro_batch_multiple
    count = step * max(1, -(-len(tight) // step))
    # Balancing may need more room than the tightest packing; then the tight, uneven micro-batches are used.
    bins = _balance(order, lengths, costs, count, token_budget) or tight + [[] for _ in range(count - len(tight))]
    weights = [sum(costs[i] for i in members) for members in bins]
    by_weight = sorted(range(count), key=lambda b: (-weights[b], b))
    ranks = _balance(by_weight, [1] * count, weights, dp_size, count // dp_size)
    assert ranks is not None, "dp_size divides the number of micro-batches"
    return [[sorted(bins[b]) for b in rank] for rank in ranks]


def _best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item, largest first, to the fullest bin with room. Bins are numbered as they open."""
    members: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), ascending
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        need = min(sizes[item], capacity)
        at = bisect_left(rooms, (need, -1))
        if at < len(rooms):
            room, index = rooms.pop(at)
        else:
            room, index = capacity, len(members)
            members.append([])
        members[index].append(item)
        insort(rooms, (room - need, index))
    return members


def _balance(
    order: Sequence[int], sizes: Sequence[int], costs: Sequence[float], bins: int, capacity: int
) -> list[list[int]] | None:
    """Each item, in the given order, to the cheapest bin with room. None if some item finds none.

    An item larger than the capacity needs an empty bin and fills it.
    """
    members: list[list[int]] = [[] for _ in range(bins)]
    room = [capacity] * bins
    smallest = min(sizes, default=0)
    heap = [(0.0, b) for b in range(bins)]  # (cost, bin); a bin too full for the smallest item is removed
    for item in order:
        need = min(sizes[item], capacity)
        passed = []
        while heap and room[heap[0][1]] < need:
            passed.append(heapq.heappop(heap))
        if not heap:
            return None
        load, best = heapq.heappop(heap)
        members[best].append(item)
        room[best] -= need
        passed.append((load + costs[item], best))
        for entry in passed:
            if room[entry[1]] >= smallest:
                heapq.heappush(heap, entry)
    return members


def collate(
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    pad_to_multiple: int = 1,
    pad_sequences_to: int = 1,
    pad_id: int = 0,
) -> PackedBatch:
    """Pack (prompt ids, response ids) pairs into one micro-batch on the CPU.

    Args:
        pairs: may be empty: the result is then one padding segment, for a rank without samples.
        pad_to_multiple: M is a multiple of it (sequence and context parallelism, FP8).
        pad_sequences_to: every segment's length is a multiple of it (context parallelism: see `zigzag`). The padding
            follows the sequence, where no real token can see it.
        pad_id: token on padding. It must be a valid id, because it is embedded like any other.

    Raises:
        ValueError: for an empty prompt (nothing would predict the first response token), and for a pair with nothing
            to predict.
    """
    for name, value in (("pad_to_multiple", pad_to_multiple), ("pad_sequences_to", pad_sequences_to)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    tokens: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    seq_index: list[int] = []
    response_pos: list[int] = []
    ends = [0]
    for index, (prompt, response) in enumerate(pairs):
        whole = prompt + response
        if not prompt or len(whole) < 2:
            raise ValueError(
                f"sample {index} has {len(prompt)} prompt and {len(response)} response tokens: "
                "packing needs at least one prompt token and one token to predict; drop it first"
            )
        fed = len(whole) - 1
        padding = -fed % pad_sequences_to
        tokens += whole[:-1] + [pad_id] * padding
        targets += whole[1:] + [pad_id] * padding
        positions += range(fed + padding)
        seq_index += [index] * fed + [-1] * padding
        response_pos += [-1] * (len(prompt) - 1) + list(range(len(response))) + [-1] * padding
        ends.append(len(tokens))
    padding = packed_length([len(tokens)], pad_to_multiple, pad_sequences_to) - len(tokens)
    if padding:
        tokens += [pad_id] * padding
        targets += [pad_id] * padding
        positions += range(padding)
        seq_index += [-1] * padding
        response_pos += [-1] * padding
        ends.append(ends[-1] + padding)
    response_pos_M = torch.tensor(response_pos, dtype=torch.int64)
    return PackedBatch(
        tokens_M=torch.tensor(tokens, dtype=torch.int64),
        targets_M=torch.tensor(targets, dtype=torch.int64),
        position_ids_M=torch.tensor(positions, dtype=torch.int64),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in zip(ends, ends[1:], strict=False)),
        response_mask_M=response_pos_M >= 0,
        seq_index_M=torch.tensor(seq_index, dtype=torch.int64),
        response_pos_M=response_pos_M,
    )


def padded_length(length: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``length``."""
    return length + -length % multiple


def packed_length(lengths: Sequence[int], pad_to_multiple: int, pad_sequences_to: int) -> int:
    """M of the `PackedBatch` that `collate` makes of sequences with these fed lengths; positive even for none."""
    total = sum(padded_length(n, pad_sequences_to) for n in lengths)
    unit = math.lcm(pad_to_multiple, pad_sequences_to)
    return max(padded_length(total, unit), unit)


def zigzag(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """(M / size,) int64: the tokens of a packed row that one context-parallel rank holds, sequence by sequence.

    Every segment is cut into 2 * size equal chunks, and rank c holds the chunks c and 2 * size - 1 - c. One attends to
    few tokens and one to many, so that all ranks do the same work under a causal mask. Megatron's rotary embedding and
    Transformer Engine's attention expect this order.

    Raises:
        ValueError: for a segment whose length is not a multiple of 2 * size, if size > 1.
    """
    total = int(cu_seqlens[-1])
    if size == 1:
        return torch.arange(total)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    if bool((lengths % (2 * size)).any()):
        raise ValueError(f"segments of {lengths.tolist()} tokens cannot be cut into {2 * size} chunks: pad them first")
    chunk_N = lengths // (2 * size)
    token_M = torch.arange(total)
    segment_M = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    chunk_M = (token_M - starts[segment_M]) // chunk_N[segment_M]
    return token_M[(chunk_M == rank) | (chunk_M == 2 * size - 1 - rank)]


@dataclass(frozen=True, slots=True)
class PackingCost:
    """The cost of packing, computed from the plan; additive over passes. See `packing_cost`."""

    tokens: int = 0  # fed tokens of all ranks, without padding
    padded_tokens: int = 0  # the same with padding
    mean_cost: float = 0.0  # of a data-parallel rank, in the unit of the cost function
    largest_cost: float = 0.0  # of the busiest one: the others wait for it

    def __add__(self, other: PackingCost) -> PackingCost:
        return PackingCost(
            self.tokens + other.tokens,
            self.padded_tokens + other.padded_tokens,
            self.mean_cost + other.mean_cost,
            self.largest_cost + other.largest_cost,
        )

    def report(self) -> dict[str, float]:
        """``perf/padding_waste``: share of padding among the input tokens. ``perf/dp_imbalance``: excess work of the
        busiest data-parallel rank, as a share of the mean work. Both are 0 at best."""
        return {
            "perf/padding_waste": 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0,
            "perf/dp_imbalance": self.largest_cost / self.mean_cost - 1 if self.mean_cost else 0.0,
        }


def packing_cost(
    planned: Sequence[Sequence[Sequence[int]]],
    lengths: Sequence[int],
    *,
    pad_to_multiple: int = 1,
    pad_sequences_to: int = 1,
    cost: Callable[[int], float] | None = None,
) -> PackingCost:
    """Of a `plan` for samples of these fed lengths, under the padding that `collate` will be asked for."""
    cost = cost or attention_cost(2048)
    padded = [
        packed_length([lengths[i] for i in members], pad_to_multiple, pad_sequences_to)
        for rank in planned
        for members in rank
    ]
    costs = [sum(cost(lengths[i]) for members in rank for i in members) for rank in planned]
    return PackingCost(sum(lengths), sum(padded), sum(costs) / len(costs), max(costs))


def response_offsets(response_lengths: Sequence[int]) -> Tensor:
    """(samples + 1,) int64: sample i owns entries ``offsets[i] : offsets[i + 1]`` of a vector in sample order."""
    return torch.tensor([0, *response_lengths], dtype=torch.int64).cumsum(0)


def response_slots(batch: PackedBatch, samples: Sequence[int], offsets: Tensor) -> Tensor:
    """Positions of the response tokens of a micro-batch in a vector in sample order.

    Args:
        batch: from `collate`, of the samples below in that order.
        samples: their indices in the whole batch: one entry of `plan`.
        offsets: `response_offsets` of the whole batch.

    Returns:
        (R,) int64, in packed order. ``values_T[slots]`` has the order of ``x_M[batch.response_mask_M]``;
        ``values_T[slots] = x_M[batch.response_mask_M]`` is the inverse.
    """
    where = batch.response_mask_M
    sample_index = torch.tensor(list(samples), dtype=torch.int64, device=where.device)
    return offsets.to(where.device)[sample_index[batch.seq_index_M[where]]] + batch.response_pos_M[where]
