"""Every GPU template under a real Slurm whose nodes show eight GPUs each: from preflight to the start of all processes.

The GPUs are device files and a stub `nvidia-smi`; the programs that would use them (`recipes.train`, vLLM's supervisor)
are stubs that record how they were started. The rest is real: allocation, checks, splitting, arguments, the end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import ROOT, Job
from test_templates import TEMPLATES, write_models

NODES, GPUS = 16, 8
TEMPLATE_NAMES = [path.stem for path in TEMPLATES if "gpus-per-node" in path.read_text()]
SMI = "NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4, 0"


@dataclass
class Started:
    """The start of one rank or server, as recorded by the stub."""

    node: str
    gpus: list[int]
    rank: str
    local_rank: str
    world: str
    master: str
    words: list[str]


def started(attempt: Path, role: str) -> dict[int, Started]:
    """The recorded starts, by number of the task in its step."""
    found = {}
    for path in attempt.glob(f"{role}-*.started"):
        lines = [line.partition("=")[::2] for line in path.read_text().splitlines()]
        values = {key: value for key, value in lines if key != "arg"}
        gpus = [int(number) for number in values.pop("gpus").split(",")]
        words = [value for key, value in lines if key == "arg"]
        found[int(path.stem.rpartition("-")[2])] = Started(gpus=gpus, words=words, **values)
    return found


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu-site")
    write_models(folder)
    (folder / "bin").mkdir()
    smi = folder / "bin" / "nvidia-smi"
    smi.write_text(f"#!/bin/bash\nfor ((i = 0; i < {GPUS}; i++)); do echo '{SMI}'; done\n")
    smi.chmod(0o755)
    stub = Path(__file__).with_name("stub_python.sh")
    (folder / "site.env").write_text(
        f"PYTHON={stub} MODELS={folder} DATA={folder} MIN_RUN_GIB=1\nexport REAL_PYTHON={sys.executable}\n"
        f"prepare_node() {{ export PATH={folder}/bin:$PATH; }}\n"
    )
    return folder


def submit(cluster: Cluster, site: Path, script: Path, name: str, *words: str, **env: str) -> Job:
    run, out = site / name, site / f"{name}.out"
    environment = {k: v for k, v in cluster.env.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    done = subprocess.run(
        ["sbatch", "--parsable", f"--output={out}", str(script), f"run.dir={run}", *words],
        cwd=ROOT,
        env=environment | {"SITE_ENV": str(site / "site.env")} | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return Job(done.stdout.strip(), cluster, out, run)


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, site: Path) -> dict[str, Job]:
    """All jobs, submitted at once: those that fit run in parallel."""
    return {name: submit(cluster, site, ROOT / "slurm" / f"{name}.sbatch", name) for name in TEMPLATE_NAMES}


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_a_template_starts_its_ranks_and_servers(name: str, jobs: dict[str, Job]) -> None:
    job = jobs[name]
    assert job.until_ended() == ("COMPLETED", "0"), job.printed()
    nodes = int(job.show("NumNodes"))
    assert job.printed().count("8 × NVIDIA H100 80GB HBM3 80 GiB") == nodes
    attempt = job.run / "logs" / "latest"
    ranks, servers = started(attempt, "learner"), started(attempt, "server")

    used: dict[str, list[int]] = defaultdict(list)
    for number, server in sorted(servers.items()):
        used[server.node] += server.gpus
        words = server.words[server.words.index("--") + 1 :]
        size = int(words[words.index("--tensor-parallel-size") + 1]) if words else 1
        assert len(server.gpus) == size, f"server {number}: {server}"
    per_node: dict[str, int] = defaultdict(int)
    for number, rank in sorted(ranks.items()):
        assert (int(rank.rank), rank.world) == (number, str(len(ranks)))
        assert int(rank.local_rank) == per_node[rank.node], "ranks are numbered node by node"
        per_node[rank.node] += 1
        assert rank.master == ranks[0].master and rank.master.startswith(f"{ranks[0].node}:")
        (urls,) = (word for word in rank.words if word.startswith("rollout.urls="))
        assert urls.count("http://") == len(servers) and f"parallel.nproc={len(ranks)}" in rank.words
    if name != "evaluate":  # its one rank needs no GPU
        for rank in ranks.values():
            assert rank.gpus == list(range(per_node[rank.node]))
        for node, count in per_node.items():
            used[node] += range(count)
    assert {node: sorted(gpus) for node, gpus in used.items()} == dict.fromkeys(used, list(range(GPUS)))
    assert len(used) == nodes, "every GPU of every node has one owner"
    shutil.rmtree(job.run)


PREFLIGHTS = """#!/bin/bash
#SBATCH --nodes=16 --gpus-per-node=8 --exclusive --mem=0 --time=10
source slurm/lib.sh
LEARNER_NODES=16 RECIPE=quickstart RUN_DIR={run} passed=0
layout; prepare_node
for ((i = 0; i < 20; i++)); do
	export ATTEMPT_DIR=$RUN_DIR/attempt_$i; mkdir -p "$ATTEMPT_DIR"; echo "$RANDOM" >"$ATTEMPT_DIR/nonce"
	(preflight) && passed=$((passed + 1))
done
echo "passed $passed of 20"
"""


@pytest.mark.slow
def test_sixteen_healthy_nodes_pass_twenty_times(cluster: Cluster, site: Path) -> None:
    script = site / "preflights.sbatch"
    script.write_text(PREFLIGHTS.format(run=site / "preflights"))
    job = submit(cluster, site, script, "preflights", CANCELLED="", LEARNER="", SERVING="")
    assert job.until_ended() == ("COMPLETED", "0")
    assert "passed 20 of 20" in job.printed(), job.printed()
    assert os.stat(site / "preflights" / "attempt_0" / "preflight" / "node16.json").st_size > 1024, "beyond a torn line"
