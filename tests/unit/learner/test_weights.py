"""Buckets in which the learner's weights are gathered. Whole exports under every layout: tests/distributed."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.learner import weights


def test_buckets_hold_neighbours_of_the_same_ranks_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BUCKET_BYTES", 10)
    experts = [f"decoder.layers.0.mlp.experts.local_experts.{i}.linear_fc1.weight" for i in range(3)]
    sizes = {"a": 4, "b": 6, "c": 1, "large": 25, "d": 1} | dict.fromkeys(experts, 5)
    owners = {"a": 0, "b": 0, "c": 0, "large": 0, "d": 2} | dict.fromkeys(experts, 2)
    found = list(weights._buckets(list(sizes), owners, sizes))
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
