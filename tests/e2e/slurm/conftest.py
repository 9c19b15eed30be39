"""A Slurm cluster for every test process, or the reason for skipping."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator

import pytest
from cluster import Cluster, install, obstacle
from jobs import Site

from recipes.models.prepare import make_tiny_model


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with (tmp_path_factory.getbasetemp().parent / "slurm-packages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one test process installs, the others wait
        install()
    if (reason := obstacle()) is not None:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.up(nodes=16, gpus=8)  # as many as the largest template needs; idle nodes cost little
    yield cluster
    cluster.down()


@pytest.fixture(scope="session")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    path = os.path.dirname(sys.executable)
    (folder / "site.env").write_text(f"PYTHON={path}/python\nMODELS=- DATA=-\nexport ORPHAN_S=15 SERVER_HANG_S=20\n")
    return Site(cluster, folder, make_tiny_model(folder / "tiny", seed=0))
