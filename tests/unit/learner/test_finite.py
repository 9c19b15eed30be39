"""NaN and infinity in a checkpoint's files are found, named, and distinguished from similar bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from conversion.publish import ManifestError, read_manifest, write_manifest
from megatron_ext.learner.finite import check_finite

INF, NAN = float("inf"), float("nan")


def checkpoint(directory: Path, **state: Any) -> tuple[str, dict[str, Any]]:
    """A checkpoint of one file, and its manifest with a segment for every piece."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(directory, thread_count=1), no_dist=True)
    stored = dcp.FileSystemReader(directory).read_metadata().storage_data
    (name,) = {info.relative_path for info in stored.values()}
    write_manifest(directory, cuts={name: [info.offset for info in stored.values()]})
    manifest = read_manifest(directory)
    assert manifest is not None
    return name, manifest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_tensor_is_named(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    bad = torch.randn(2_500_001).to(dtype)  # the last of several blocks
    bad[-1] = value
    name, manifest = checkpoint(tmp_path, good=torch.randn(7), step=torch.tensor(3), bad=bad, other=torch.ones(3))
    with pytest.raises(ManifestError, match=rf"{name} holds 1 of 2500001 values that are not finite in bad: "):
        check_finite(tmp_path, name, manifest)


def test_opposite_infinities_do_not_cancel(tmp_path: Path) -> None:
    name, manifest = checkpoint(tmp_path, bad=torch.tensor([INF, 1.0, -INF]))
    with pytest.raises(ManifestError, match="2 of 3 values"):
        check_finite(tmp_path, name, manifest)


def test_finite_numbers_pass(tmp_path: Path) -> None:
    """Also numbers whose sum overflows, integers with the bits of a NaN, and objects."""
    huge = torch.full((1000,), 3e38)
    state = {"huge": huge, "half": huge.bfloat16(), "mask": torch.full((9,), -1, dtype=torch.int32), "empty": huge[:0]}
    check_finite(tmp_path, *checkpoint(tmp_path, **state, words={"a": [1, "b"]}))
