"""Control data between ranks: broadcasts and barriers on the CPU, in which ranks may wait for days.

Rank 0 generates, evaluates and writes files while the other ranks wait for it in a separate gloo group. A wait inside a
device collective would end at its short limit (``run.collective_timeout_s``), and would keep the GPU busy that a
colocated rollout server needs. If a peer is lost while others wait here, its heartbeat (`megatron_ext.progress`)
detects it, not a time limit.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

WAIT = timedelta(days=14)  # in milliseconds it fits into 31 bits
_made: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None  # the default group, and the control group beside it


def rendezvous(timeout_s: float) -> dict[str, Any]:
    """Arguments of `init_process_group` for a rendezvous at the environment's MASTER_ADDR and MASTER_PORT.

    torch would let rank 0 listen on every interface, without authentication; here it listens only on MASTER_ADDR.
    Under torchrun, whose agent has its own store, they are {}.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not os.environ.get("MASTER_PORT"):
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    limit = timedelta(seconds=timeout_s)
    if rank:
        store = dist.TCPStore(host, port, world, False, limit)
    else:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((socket.gethostbyname(host), port))
            listener.listen(world)
            descriptor = listener.detach()
        store = dist.TCPStore(host, port, world, True, limit, wait_for_workers=False, master_listen_fd=descriptor)
    return {"store": store, "rank": rank, "world_size": world}


def group() -> dist.ProcessGroup:
    """The control group of all ranks, made at the first call, which is a collective."""
    global _made
    world = dist.group.WORLD
    assert world is not None, "no process group: call this inside `megatron_ext.learner.model.distributed`"
    if _made is None or _made[0] is not world:  # a process may form several default groups, one after the other
        made = dist.new_group(backend="gloo", timeout=WAIT, group_desc="control")
        assert made is not None
        _made = world, made
    return _made[1]


def broadcast_bytes(data: bytes, *, src: int) -> bytes:
    """``data`` of rank ``src`` on every rank; not pickled. Waits for that rank without a practical limit."""
    if dist.get_world_size() == 1:
        return data
    size = torch.tensor([len(data)])
    dist.broadcast(size, src=src, group=group())
    if dist.get_rank() == src:
        buffer = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
    else:
        buffer = torch.empty(int(size), dtype=torch.uint8)
    if len(buffer):
        dist.broadcast(buffer, src=src, group=group())
    return data if dist.get_rank() == src else buffer.numpy().tobytes()


def agree(flag: bool) -> bool:
    """Rank 0's flag on every rank."""
    return broadcast_bytes(bytes([flag]), src=0) == b"\x01"


def barrier() -> None:
    """Every rank has arrived. Waits without a practical limit."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier(group=group())
