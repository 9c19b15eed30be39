"""The kernel of the weights' digest, in Triton's interpreter, against torch's operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ext.sync import base


@pytest.fixture
def triton_lanes() -> Any:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the kernel checks itself at first use")
    return pytest.importorskip("megatron_ext.sync.triton_lanes")


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_the_kernel_gives_the_same_bits(triton_lanes: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_lanes, "BLOCK", 16)
    generator = torch.Generator().manual_seed(rows)
    words = torch.randint(-(2**31), 2**31, (rows, 64), generator=generator, dtype=torch.int64).int()
    weights = torch.randint(-(2**62), 2**62, (2, 64), generator=generator) * 2 + 1
    assert torch.equal(triton_lanes.lanes(words.reshape(-1), weights), base._lanes_of(words, weights))
    words[-1, 5:] = 0
    short = words.reshape(-1)[: rows * 64 - 59]
    assert torch.equal(triton_lanes.lanes(short, weights), base._lanes_of(words, weights))


@pytest.mark.parametrize("nbytes", [0, 3, 12, 256, 257, 4096 + 12])
def test_a_digest_by_the_kernel_is_the_same(triton_lanes: Any, nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "LANE_WORDS", 64)
    base._lane_weights.cache_clear()
    data = torch.randint(0, 256, (nbytes + 1,), generator=torch.Generator().manual_seed(nbytes), dtype=torch.uint8)
    for flat in (data[:nbytes], data[1:]):  # the second is not aligned
        expected = base.lanes(flat)
        with monkeypatch.context() as patch:
            patch.setattr(base, "_fused_lanes", lambda device: triton_lanes.lanes)
            assert torch.equal(base.lanes(flat), expected)
    base._lane_weights.cache_clear()
