"""GPU tests measure with the code of tests/distributed, where it is tested without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))


@pytest.fixture
def transformer_engine() -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """Megatron's groups for this process, for the tests of a module."""
    from configs.schema import ParallelConfig
    from megatron_ext.learner.model import distributed

    with distributed(ParallelConfig(), 0, alone=True):
        yield
    torch.cuda.empty_cache()
