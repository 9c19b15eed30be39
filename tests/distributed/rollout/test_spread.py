"""Every rank writes its part of an update into files of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gloo
import pytest
import torch
from torch import Tensor

from megatron_ext.sync.base import Clock, WeightUpdateError, stage_weights
from megatron_ext.sync.disk import DiskSync
from megatron_ext.sync.receive import Update, read_verified
from recipes.loop.spread import Spread, everyone_sees

pytestmark = pytest.mark.distributed


def part(rank: int, version: int) -> Iterator[tuple[str, Tensor]]:
    """One buffer for all tensors, as an export may have."""
    buffer = torch.empty(5)
    for index in range(3):
        yield f"rank{rank}.{index}", buffer.fill_(100 * version + 10 * rank + index)


def staged(rank: int, spread: Spread, sync: DiskSync | None, version: int) -> dict[str, Tensor]:
    if sync is None:
        spread.write(part(rank, version))
        return {}
    stage_weights(sync, version, part(rank, version), ranks=spread)
    assert sync.info is not None
    return {name: tensor.clone() for name, tensor in read_verified(Update(**sync.info), Clock({})).items()}


def write(rank: int, root: Path, parent: Path | None) -> None:
    with gloo.group(rank, 2, root / f"store-{parent is None}"):
        sync = DiskSync(parent) if rank == 0 else None
        assert everyone_sees(sync.root if sync else None)
        assert not everyone_sees(root / "elsewhere" if rank == 0 else None)
        assert not everyone_sees(None)
        spread, nodes = Spread(), []
        for version in (1, 2):
            found = staged(rank, spread, sync, version)
            if sync is not None:
                expected = {name: tensor.clone() for r in range(2) for name, tensor in part(r, version)}
                assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
                assert sync.info is not None and len(sync.info["files"]) == 2
                nodes.append([(sync.root / f"v00000{version}" / name).stat().st_ino for name in sync.info["files"]])
        assert parent is not None or not nodes or nodes[0] == nodes[1], "files in memory are written in place"
        if rank == 1:  # it sees another directory than the one that it is told
            spread._files.begin = lambda stage: (_ for _ in ()).throw(OSError("no such directory"))  # type: ignore[method-assign, assignment]
        if sync is not None:
            with pytest.raises(WeightUpdateError, match="rank 1 could not write its part of the weights: no such"):
                staged(rank, spread, sync, 3)
            assert sync.info is None
        else:
            staged(rank, spread, sync, 3)
        if rank == 1:
            del spread._files.begin
        found = staged(rank, spread, sync, 4)
        assert rank or len(found) == 6
        if sync is not None:
            sync.close()
            assert not sync.root.exists()


def both(rank: int, root: Path) -> None:
    for parent in (None, root / "shared"):  # in memory, and on a file system
        write(rank, root, parent)


def test_every_rank_writes_its_part(tmp_path: Path) -> None:
    gloo.run(2, both, tmp_path, timeout_s=120)
