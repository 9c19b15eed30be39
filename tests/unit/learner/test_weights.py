"""Buckets in which the learner's weights are gathered. Whole exports under every layout: tests/distributed."""

from __future__ import annotations

import torch

from megatron_ext.learner import weights


def test_buckets_hold_neighbours_of_the_same_ranks_up_to_a_size() -> None:
    experts = [f"decoder.layers.0.mlp.experts.local_experts.{i}.linear_fc1.weight" for i in range(3)]
    sizes = {"a": 4, "b": 6, "c": 1, "large": 25, "d": 1} | dict.fromkeys(experts, 5)
    owners = {"a": 0, "b": 0, "c": 0, "large": 0, "d": 2} | dict.fromkeys(experts, 2)
    found = list(weights._buckets(list(sizes), owners, sizes, 10))
    assert found == [["a", "b"], ["c"], ["large"], ["d"], experts[:2], experts[2:]]


def test_a_bucket_of_several_dtypes_comes_apart_as_it_was() -> None:
    tensors = [
        torch.arange(3, dtype=torch.bfloat16),
        torch.randn(2, 3, dtype=torch.float64),
        torch.randn(4, 5).t(),
        torch.tensor(7),
        torch.zeros(0),
    ]
    for found, tensor in zip(weights._unpack(weights._pack(tensors), tensors), tensors, strict=True):
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_tensor_parallel_ranks_share_buckets_by_bytes_so_far() -> None:
    loads = [[0, 0, 0] for _ in range(3)]  # every rank keeps the same account
    taken = [[weights._share(sizes, rank, loads[rank]) for rank in range(3)] for sizes in ([9], [8], [1, 7, 2], [1])]
    # The third bucket: 7 and 2 go to the rank that has nothing, 1 to the one that has 8 bytes. Then all have 9.
    assert taken == [[[0], [], []], [[], [0], []], [[], [0], [1, 2]], [[0], [], []]]
    assert loads[0] == loads[1] == loads[2] == [10, 9, 9]
