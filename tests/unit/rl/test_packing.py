"""The plan loses no sample and meets every constraint; unpacking is the inverse of packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.rl import packing
from megatron_ext.rl.packing import (
    collate,
    fed_length,
    plan,
    response_offsets,
    response_slots,
    zigzag,
)

PAIRS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 99), min_size=1, max_size=6), st.lists(st.integers(100, 199), min_size=1, max_size=7)
    ),
    max_size=9,
)


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 60), max_size=40),
    dp_size=st.integers(1, 5),
    token_budget=st.integers(1, 50),
    multiple=st.integers(1, 3),
)
def test_plan_keeps_its_promises(lengths: list[int], dp_size: int, token_budget: int, multiple: int) -> None:
    planned = plan(lengths, dp_size=dp_size, token_budget=token_budget, micro_batch_multiple=multiple)
    assert len(planned) == dp_size
    counts = {len(rank) for rank in planned}
    assert len(counts) == 1
    assert (count := counts.pop()) >= 1 and count % multiple == 0
    micro_batches = [micro_batch for rank in planned for micro_batch in rank]
    assert sorted(i for micro_batch in micro_batches for i in micro_batch) == list(range(len(lengths)))
    for micro_batch in micro_batches:
        assert sum(lengths[i] for i in micro_batch) <= token_budget or len(micro_batch) == 1
    # Rounding up to whole ranks is the only reason for a micro-batch more than one sample each would need.
    assert len(micro_batches) < max(len(lengths), 1) + dp_size * multiple
    assert planned == plan(list(lengths), dp_size=dp_size, token_budget=token_budget, micro_batch_multiple=multiple)


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=7), token_budget=st.integers(20, 30))
def test_plan_needs_at_most_one_micro_batch_more_than_the_optimum(lengths: list[int], token_budget: int) -> None:
    """Best-fit decreasing against the exact optimum, by dynamic programming over subsets."""
    everything = 2 ** len(lengths)
    total = [sum(n for i, n in enumerate(lengths) if subset >> i & 1) for subset in range(everything)]
    fewest = [0] + [len(lengths)] * (everything - 1)
    for subset in range(1, everything):
        part = subset
        while part:
            if total[part] <= token_budget:
                fewest[subset] = min(fewest[subset], 1 + fewest[subset ^ part])
            part = (part - 1) & subset
    count = len(plan(lengths, dp_size=1, token_budget=token_budget)[0])
    assert fewest[-1] <= count <= fewest[-1] + 1


def test_plan_fills_micro_batches_exactly_where_that_is_possible() -> None:
    planned = plan([6, 4, 7, 3, 5, 5, 8, 2], dp_size=2, token_budget=10)
    assert [[sum([6, 4, 7, 3, 5, 5, 8, 2][i] for i in mb) for mb in rank] for rank in planned] == [[10, 10], [10, 10]]


def test_plan_balances_cost_and_not_only_tokens() -> None:
    """One sequence of 8 costs as much as four of 4 when cost is quadratic."""
    lengths = [8, 4, 4, 4, 4]
    planned = plan(lengths, dp_size=2, token_budget=16, cost=lambda n: float(n * n))
    assert sorted(planned) == [[[0]], [[1, 2, 3, 4]]]


def test_plan_balances_ranks_on_a_long_tailed_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [int(n) for n in (torch.randn(512, generator=generator) * 0.9 + 6).exp().clamp(20, 4096)]
    cost = packing.attention_cost(2048)
    loads = [
        sum(cost(lengths[i]) for micro_batch in rank for i in micro_batch)
        for rank in plan(lengths, dp_size=4, token_budget=8192)
    ]
    assert max(loads) <= 1.02 * sum(loads) / 4


def test_plan_with_fewer_samples_than_micro_batches_leaves_some_empty() -> None:
    assert plan([3, 5], dp_size=4, token_budget=16) == [[[1]], [[0]], [[]], [[]]]
    assert plan([], dp_size=2, token_budget=16) == [[[]], [[]]]


def test_an_oversized_sample_is_alone_or_refused() -> None:
    planned = plan([100, 3, 3], dp_size=1, token_budget=10)
    assert sorted(planned[0]) == [[0], [1, 2]]
    with pytest.raises(ValueError, match="100 tokens exceeds token_budget=10"):
        plan([100, 3, 3], dp_size=1, token_budget=10, oversize="raise")


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"dp_size": 0, "token_budget": 8}, "dp_size=0"),
        ({"dp_size": 1, "token_budget": 0}, "token_budget=0"),
        ({"dp_size": 1, "token_budget": 8, "micro_batch_multiple": 0}, "micro_batch_multiple=0"),
    ],
)
def test_plan_refuses_impossible_sizes(kwargs: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan([1, 2], **kwargs)  # type: ignore[arg-type]


def test_plan_refuses_an_empty_sequence() -> None:
    with pytest.raises(ValueError, match="length 0"):
        plan([4, 0], dp_size=1, token_budget=8)


def test_collate_by_hand() -> None:
    """Two samples and one token of padding; the last response token (13, 25) is a target only."""
    batch = collate([([1, 2, 3], [11, 12, 13]), ([4], [25])], pad_to_multiple=7, pad_id=9)
    assert batch.tokens_M.tolist() == [1, 2, 3, 11, 12, 4, 9]
    assert batch.targets_M.tolist() == [2, 3, 11, 12, 13, 25, 9]
    assert batch.position_ids_M.tolist() == [0, 1, 2, 3, 4, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 5, 6, 7]
    assert batch.max_seqlen == 5
    assert batch.response_mask_M.tolist() == [False, False, True, True, True, True, False]
    assert batch.seq_index_M.tolist() == [0, 0, 0, 0, 0, 1, -1]
    assert batch.response_pos_M.tolist() == [-1, -1, 0, 1, 2, 0, -1]
    assert batch.cu_seqlens.dtype == torch.int32
    assert {batch.tokens_M.dtype, batch.targets_M.dtype, batch.seq_index_M.dtype} == {torch.int64}


def test_a_batch_moves_as_a_whole() -> None:
    batch = collate([([1, 2], [3])]).to("meta")
    tensors = [value for name in batch.__slots__ if isinstance(value := getattr(batch, name), torch.Tensor)]
    assert len(tensors) == 7 and all(tensor.is_meta for tensor in tensors)
    assert batch.max_seqlen == 2


@pytest.mark.parametrize("multiple", [1, 8])
def test_collate_without_samples_is_padding_only(multiple: int) -> None:
    batch = collate([], pad_to_multiple=multiple, pad_id=3)
    assert batch.tokens_M.tolist() == [3] * multiple
    assert batch.cu_seqlens.tolist() == [0, multiple]
    assert not batch.response_mask_M.any()
    assert (batch.seq_index_M == -1).all()


@pytest.mark.parametrize("pair", [([], [5, 6]), ([1], [])])
def test_collate_refuses_what_cannot_be_trained(pair: tuple[list[int], list[int]]) -> None:
    with pytest.raises(ValueError, match="sample 1 has"):
        collate([([1], [2]), pair])


def test_collate_accepts_a_prompt_without_response() -> None:
    batch = collate([([1, 2, 3], [])])
    assert batch.tokens_M.tolist() == [1, 2]
    assert not batch.response_mask_M.any()


@settings(deadline=None, max_examples=100)
@given(pairs=PAIRS, multiple=st.integers(1, 9))
def test_every_segment_is_its_sample(pairs: list[tuple[list[int], list[int]]], multiple: int) -> None:
    batch = collate(pairs, pad_to_multiple=multiple)
    total = batch.tokens_M.numel()
    fed = sum(fed_length(len(p), len(r)) for p, r in pairs)
    assert total % multiple == 0 and total < max(fed, 1) + multiple
    ends = batch.cu_seqlens.tolist()
    assert ends[0] == 0 and ends[-1] == total
    for index, (prompt, response) in enumerate(pairs):
        rows = slice(ends[index], ends[index + 1])
        assert batch.tokens_M[rows].tolist() + [batch.targets_M[rows][-1].item()] == prompt + response
        assert batch.position_ids_M[rows].tolist() == list(range(len(prompt) + len(response) - 1))
        assert (batch.seq_index_M[rows] == index).all()
        assert batch.targets_M[rows][batch.response_mask_M[rows]].tolist() == response
        assert batch.response_pos_M[rows][batch.response_mask_M[rows]].tolist() == list(range(len(response)))
    assert batch.max_seqlen == max(b - a for a, b in zip(ends, ends[1:], strict=False))
    assert int(batch.response_mask_M.sum()) == sum(len(r) for _, r in pairs)


@settings(deadline=None, max_examples=100)
@given(pairs=PAIRS, dp_size=st.integers(1, 3), token_budget=st.integers(1, 30))
def test_sample_order_survives_any_packing(
    pairs: list[tuple[list[int], list[int]]], dp_size: int, token_budget: int
) -> None:
    """Response token ids, written back through the slots of every micro-batch, are the concatenated responses."""
    expected = torch.tensor([token for _, response in pairs for token in response], dtype=torch.int64)
    offsets = response_offsets([len(response) for _, response in pairs])
    written = torch.full_like(expected, -1)
    lengths = [fed_length(len(p), len(r)) for p, r in pairs]
    for rank in plan(lengths, dp_size=dp_size, token_budget=token_budget):
        for samples in rank:
            batch = collate([pairs[i] for i in samples], pad_to_multiple=4)
            slots = response_slots(batch, samples, offsets)
            assert (written[slots] == -1).all()  # no slot is written twice
            written[slots] = batch.targets_M[batch.response_mask_M]
    assert torch.equal(written, expected)


def test_zigzag_by_hand() -> None:
    """Segments of 8, 0 and 4 tokens on two ranks: chunks 0 and 3 of each, and chunks 1 and 2."""
    cu_seqlens = torch.tensor([0, 8, 8, 12], dtype=torch.int32)
    assert zigzag(cu_seqlens, 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag(cu_seqlens, 1, 2).tolist() == [2, 3, 4, 5, 9, 10]
    assert zigzag(cu_seqlens, 0, 1).tolist() == list(range(12))
    with pytest.raises(ValueError, match=r"segments of \[8, 0, 4\] tokens cannot be cut into 8 chunks"):
        zigzag(cu_seqlens, 0, 4)


def test_collate_pads_sequences_by_hand() -> None:
    """Sequences to multiples of 4 for context parallelism, the whole to a multiple of 10, hence of 20."""
    batch = collate([([1, 2, 3], [11, 12, 13]), ([4], [25])], pad_to_multiple=10, pad_sequences_to=4, pad_id=9)
    assert batch.tokens_M.tolist() == [1, 2, 3, 11, 12, 9, 9, 9, 4, 9, 9, 9] + [9] * 8
    assert batch.targets_M.tolist() == [2, 3, 11, 12, 13, 9, 9, 9, 25, 9, 9, 9] + [9] * 8
    assert batch.position_ids_M.tolist() == [*range(8), *range(4), *range(8)]
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 20] and batch.max_seqlen == 8
    assert batch.response_mask_M.nonzero()[:, 0].tolist() == [2, 3, 4, 8]
    assert batch.seq_index_M.tolist() == [0] * 5 + [-1] * 3 + [1] + [-1] * 11
    assert collate([], pad_to_multiple=3, pad_sequences_to=4).cu_seqlens.tolist() == [0, 12]


@settings(deadline=None, max_examples=100)
@given(pairs=PAIRS, size=st.sampled_from([1, 2, 3, 4]), total=st.integers(1, 24))
def test_padding_hides_nothing_and_the_shares_are_equal(
    pairs: list[tuple[list[int], list[int]]], size: int, total: int
) -> None:
    multiple = 2 * size if size > 1 else 1
    batch = collate(pairs, pad_to_multiple=total, pad_sequences_to=multiple)
    plain = collate(pairs)
    real, was_real = batch.seq_index_M >= 0, plain.seq_index_M >= 0
    for name in ("tokens_M", "targets_M", "position_ids_M", "response_mask_M", "seq_index_M", "response_pos_M"):
        assert torch.equal(getattr(batch, name)[real], getattr(plain, name)[was_real]), name
    lengths = [fed_length(len(p), len(r)) for p, r in pairs]
    assert len(batch.tokens_M) == packing.packed_length(lengths, total, multiple)
    assert len(batch.tokens_M) % total == 0 and not (batch.cu_seqlens.diff() % multiple).any()
    shares = [zigzag(batch.cu_seqlens, rank, size) for rank in range(size)]
    assert {len(share) for share in shares} == {len(batch.tokens_M) // size}
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(len(batch.tokens_M)))


def test_what_packing_costs() -> None:
    """Two ranks of 12 and 8 real tokens in three micro-batches of 8 and one of 4 after padding to multiples of 4."""
    planned, lengths = [[[0], [1, 2]], [[3], [4]]], [7, 3, 2, 6, 2]
    cost = packing.packing_cost(planned, lengths, pad_sequences_to=4, cost=float)
    assert (cost.tokens, cost.padded_tokens) == (20, 8 + 8 + 8 + 4)
    report = (cost + cost).report()
    assert report == {
        "perf/padding_waste": pytest.approx(1 - 20 / 28),
        "perf/dp_imbalance": pytest.approx(12 / 10 - 1),
    }
    assert packing.PackingCost().report() == {"perf/padding_waste": 0.0, "perf/dp_imbalance": 0.0}


def test_responses_of_32k_tokens_under_context_parallelism() -> None:
    """A long-tailed batch up to 32,768 tokens, four ranks to a sequence: little is padding, and ranks are balanced."""
    generator = torch.Generator().manual_seed(0)
    lengths = [int(n) for n in (torch.randn(256, generator=generator) * 1.2 + 8).exp().clamp(200, 32768)]
    assert max(lengths) == 32768
    cost = packing.attention_cost(2048)
    planned = plan([packing.padded_length(n, 8) for n in lengths], dp_size=4, token_budget=65536, cost=cost)
    report = packing.packing_cost(planned, lengths, pad_to_multiple=64, pad_sequences_to=8, cost=cost).report()
    assert report["perf/padding_waste"] < 0.002 and report["perf/dp_imbalance"] < 0.02
    longest = collate([([1] * 100, [2] * (lengths[i] - 99)) for i in planned[0][0]], pad_sequences_to=8)
    assert len(longest.tokens_M) <= 65536 and len(zigzag(longest.cu_seqlens, 3, 4)) == len(longest.tokens_M) // 4
