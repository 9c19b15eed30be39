from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint


class CudaRNGStatesTracker: ...


@contextlib.contextmanager
def activation_recompute_forward(**_: Any) -> Iterator[None]:
    yield


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool,
    get_rng_state_tracker: Any,
    tp_group: Any,
    **kwargs: Any,
) -> torch.Tensor:
    assert not distribute_saved_activations
    result: torch.Tensor = torch_checkpoint(function, *args, use_reentrant=False, **kwargs)
    return result
