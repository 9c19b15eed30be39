"""Control data between ranks: broadcasts and barriers on the CPU, in which ranks may wait for days.

Rank 0 generates, evaluates and writes files while the other ranks wait for it in a separate gloo group. A wait inside a
device collective would end at its short limit (``run.collective_timeout_s``), and would keep the GPU busy that a
colocated rollout server needs. If a peer is lost while others wait here, its heartbeat (`megatron_ext.progress`)
detects it, not a time limit.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WAIT = timedelta(days=14)  # in milliseconds it fits into 31 bits
_made: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None  # the default group, and the control group beside it
_replicas: tuple[dist.ProcessGroup, list[list[int]], dist.ProcessGroup | None] | None = None  # see `deal`


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


def gather_bytes(data: bytes) -> list[bytes]:
    """The data of every rank, in order, on rank 0; [] on the others. Not pickled. Waits without a practical limit."""
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = torch.zeros(world, dtype=torch.int64)
    sizes[rank] = len(data)
    dist.all_reduce(sizes, group=group())
    if rank:
        if data:
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0, group=group())
        return []
    found = [data]
    for source in range(1, world):
        buffer = torch.empty(int(sizes[source]), dtype=torch.uint8)
        if len(buffer):
            dist.recv(buffer, source, group=group())
        found.append(buffer.numpy().tobytes())
    return found


def deal(parts: Sequence[Tensor], replica: int, into: Tensor) -> None:
    """Write rank 0's ``parts[replica]`` into ``into`` on every rank of data-parallel replica ``replica``. A collective.

    Rank 0 sends each part once, to one rank of the replica, which passes it on: its network carries every part once,
    however many ranks a replica has. ``parts`` matters on rank 0 only; ``into`` has the part's shape and dtype.
    """
    members, mine = _replica_groups(replica)
    leader = members[replica][0]
    if dist.get_rank() == 0:
        sends = [
            dist.isend(part, ranks[0], group=group())
            for part, ranks in zip(parts, members, strict=True)
            if ranks[0] and len(part)
        ]
        into.copy_(parts[replica])
        for send in sends:
            if send is not None:
                send.wait()
    elif dist.get_rank() == leader and len(into):
        dist.recv(into, 0, group=group())
    if mine is not None and len(into):
        dist.broadcast(into, src=leader, group=mine)


def _replica_groups(replica: int) -> tuple[list[list[int]], dist.ProcessGroup | None]:
    """Ranks of every replica, in ascending order, and this rank's own group: None when it is alone in its replica."""
    global _replicas
    world = dist.group.WORLD
    assert world is not None
    if _replicas is None or _replicas[0] is not world:
        of_rank = torch.zeros(dist.get_world_size(), dtype=torch.int64)
        of_rank[dist.get_rank()] = replica
        dist.all_reduce(of_rank, group=group())
        members = [torch.nonzero(of_rank == number)[:, 0].tolist() for number in range(int(of_rank.max()) + 1)]
        own = None
        # Every rank makes every group. `use_local_synchronization` would avoid that, but torch names such a group after
        # the number of groups that a rank is in; pipeline stages differ in that and would wait forever.
        for number, ranks in enumerate(members):
            if len(ranks) > 1:
                made = dist.new_group(ranks, backend="gloo", timeout=WAIT, group_desc=f"replica-{number}")
                own = made if number == replica else own
        _replicas = world, members, own
    return _replicas[1], _replicas[2]


def agree(flag: bool) -> bool:
    """Rank 0's flag on every rank."""
    return broadcast_bytes(bytes([flag]), src=0) == b"\x01"


def barrier() -> None:
    """Every rank has arrived. Waits without a practical limit."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier(group=group())
