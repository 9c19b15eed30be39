"""Run a function in several processes that can form gloo groups, with a hard time limit."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing.forkserver
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes are forked from a server with the imports done: importing Megatron eight times takes longer than most tests.
# Not with a GPU: an initialised CUDA context does not survive a fork.
if not torch.cuda.is_available():
    multiprocessing.forkserver.set_forkserver_preload(["megatron_ext.learner.checkpoint", "recipes.train"])


_port = 0  # of the store, in processes started by `run`


def run(
    processes: int, function: Callable[..., None], *args: Any, timeout_s: float, start_method: str = "forkserver"
) -> None:
    """Run ``function(rank, *args)`` in several processes; a module-level function of an importable module.

    ``start_method="spawn"`` gives processes that have imported nothing yet.

    Raises the error of `torch.multiprocessing.spawn` for the first process that fails, and TimeoutError when a process
    has not ended in time. No process is left in either case.
    """
    store = _serve_store()
    context = mp.start_processes(
        _entry, args=(store.port, function, *args), nprocs=processes, join=False, start_method=start_method
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


def _serve_store() -> dist.TCPStore:
    """The store in which all groups of a call of `run` meet, on this machine only. A file's would be polled."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        descriptor = listener.detach()
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)


def _entry(rank: int, port: int, function: Callable[..., None], *args: Any) -> None:
    global _port
    _port = port
    torch.set_num_threads(1)
    function(rank, *args)


@contextlib.contextmanager
def group(rank: int, world: int, name: object) -> Iterator[None]:
    """Make this process ``rank`` of a default process group of ``world``, inside a function started by `run`.

    Several groups can follow each other in the same processes, each with a name of its own. No timeout is shorter than
    the time limit of `run`: a process without a part in one group waits in the next one for the others.
    """
    limit = timedelta(minutes=30)
    store = dist.PrefixStore(str(name), dist.TCPStore("127.0.0.1", _port, is_master=False, timeout=limit))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    yield
    dist.destroy_process_group()  # not after an error: the other ranks may never reach it
    gc.collect()  # models hold Megatron's groups, and so their threads, in reference cycles
