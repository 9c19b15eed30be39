"""Every rank writes a part of an update into files of its own (`weights.export_hf` with ``spread``).

Only where all ranks see the directory of the files: ranks of one machine, or a shared file system
(``rollout.sync_dir``). Then gathering, copies, digests and writing are divided among all ranks, and no weight goes
through rank 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.learner import control
from megatron_ext.sync.base import WeightDigest, WeightUpdateError
from megatron_ext.sync.disk import DiskSync, Files


class Spread:
    """On rank 0 it is the `base.Ranks` of `base.stage_weights`; the other ranks call `write`."""

    def __init__(self) -> None:
        self._files = Files(f"rank{dist.get_rank():05d}")
        self._sync: DiskSync | None = None

    def begin(self, sync: Any) -> None:
        """Rank 0: tell the others where to write."""
        assert isinstance(sync, DiskSync) and sync.stage is not None
        self._sync = sync
        control.broadcast_bytes(json.dumps([str(sync.stage), sync.digest]).encode(), src=0)

    def collect(self) -> list[dict[str, str]]:
        """Rank 0: the manifests of the others. WeightUpdateError when one could not write."""
        assert self._sync is not None
        found = []
        for rank, answer in enumerate(control.gather_bytes(b"{}")[1:], 1):
            part = json.loads(answer)
            if part["error"]:
                raise WeightUpdateError(f"rank {rank} could not write its part of the weights: {part['error']}")
            self._sync.adopt(part["files"])
            found.append(part["tensors"])
        return found

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Another rank: write ``tensors``, which are a collective. A failure is reported to rank 0."""
        place, kind = json.loads(control.broadcast_bytes(b"", src=0))
        digest, error, files = WeightDigest(kind), "", []
        try:
            self._files.begin(Path(place))
        except OSError as problem:
            error = str(problem)
        for name, tensor in tensors:  # to the end, whatever happens here: others take part in every gather
            if not error:
                try:
                    copy = self._files.put(name, tensor)
                    digest.add(name, copy if tensor.is_cuda else tensor)
                except (OSError, ValueError) as problem:
                    error = f"{name}: {problem}"
        try:
            files = self._files.end()
        except OSError as problem:
            error = error or str(problem)
        part = {"files": files, "tensors": digest.manifest(), "error": error}
        control.gather_bytes(json.dumps(part).encode())


def everyone_sees(root: Path | None) -> bool:
    """Whether all ranks see rank 0's directory ``root``, which a transport made. A collective; None: no."""
    told = control.broadcast_bytes(b"" if root is None else str(root).encode(), src=0).decode()
    seen = torch.tensor([int(bool(told) and (Path(told) / "lock").exists())])
    dist.all_reduce(seen, op=dist.ReduceOp.MIN, group=control.group())
    return bool(seen)
