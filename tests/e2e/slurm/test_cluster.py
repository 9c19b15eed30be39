"""The test cluster itself."""

from __future__ import annotations

import pytest
from cluster import Cluster, until


def test_two_clusters_live_side_by_side(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("two")  # a short name: slurmd's sockets lie below it
    other = Cluster(folder)
    other.up(nodes=1)
    try:
        numbers = []
        for one in (cluster, other):
            out = folder / f"{one.link}.out"
            numbers.append(one.ask("sbatch", "--parsable", f"--output={out}", "--wrap=hostname; hostname -I"))
            until("the job", lambda one=one, out=out: out.exists() and one.subnet in out.read_text(), 120)  # type: ignore[misc]
            assert out.read_text().startswith("node1\n")
        assert len(set(numbers)) == 2 and cluster.subnet != other.subnet
    finally:
        other.down()
    assert "is UP" in cluster.ask("scontrol", "ping"), "the end of one is not the end of the other"
    assert cluster.ask("sinfo", "-h", "-n", "node1", "-o", "%t") in ("idle", "mix", "alloc")
