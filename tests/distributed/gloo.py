"""Run a function in several processes that can form gloo groups, with a hard end."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing.forkserver
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes are forked from a server that has imported what they need: importing Megatron eight times takes longer than
# most tests. Not beside a GPU: CUDA, once asked for, does not survive a fork.
if not torch.cuda.is_available():
    multiprocessing.forkserver.set_forkserver_preload(["megatron_ext.learner.checkpoint", "recipes.train"])


def run(
    processes: int, function: Callable[..., None], *args: Any, timeout_s: float, start_method: str = "forkserver"
) -> None:
    """``function(rank, *args)`` in that many processes; a module-level function of an importable module.

    ``start_method="spawn"`` gives processes that have imported nothing yet.

    Raises what `torch.multiprocessing.spawn` raises for the first process that fails, and TimeoutError when not all
    have ended in time. No process is left in either case.
    """
    context = mp.start_processes(
        _entry, args=(function, *args), nprocs=processes, join=False, start_method=start_method
    )
    deadline = time.monotonic() + timeout_s
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__} in {processes} processes took more than {timeout_s} s")
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _entry(rank: int, function: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    function(rank, *args)


@contextlib.contextmanager
def group(rank: int, world: int, store: Path) -> Iterator[None]:
    """This process as ``rank`` of a default process group of ``world``, meeting at the file ``store``.

    Several groups can follow each other in the same processes, each with a file of its own. Nothing is shorter than
    the time limit of `run`: a process without a part in one group waits in the next one for the others.
    """
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(minutes=30)
    )
    yield
    dist.destroy_process_group()  # not after an error: the others may never come to it
    gc.collect()  # models hold Megatron's groups in reference cycles, and so their threads
