"""Jobs of our templates on the test cluster: submit, wait, inspect processes."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from cluster import Cluster, command_line
from training import SETTINGS

ROOT = Path(__file__).resolve().parents[3]
LOCAL = (*SETTINGS, "eval.every=0", "train.entropy_probe_every=0")
LONG = (*LOCAL, "train.steps=20", "train.save_every=2")
PATIENCE_S = 300.0  # a busy machine is ten times slower than an idle one


def steps(run: Path) -> int:
    """Lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@dataclass
class Job:
    """A submitted job: its number, output and run directory."""

    number: str
    cluster: Cluster
    out: Path
    run: Path

    def show(self, key: str) -> str:
        for _ in range(3):  # slurmctld may be too busy to answer in time
            words = self.cluster.ask("scontrol", "show", "job", self.number).split()
            if found := [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]:
                return found[0]
            time.sleep(1.0)
        raise AssertionError(f"scontrol says nothing of {key} of job {self.number}")

    def printed(self) -> str:
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    def until(self, what: str, condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> float:
        """Wait for a condition and return the seconds it took; on timeout the error has the job's output."""
        begin = time.monotonic()
        while not condition():
            if time.monotonic() - begin > timeout_s:
                logs = "".join(f"\n== {p.name}\n{p.read_text()[-2000:]}" for p in self.run.glob("logs/latest/*.log"))
                raise AssertionError(f"{what}: not after {timeout_s:.0f} s\n{self.printed()}{logs}")
            time.sleep(0.05)
        return time.monotonic() - begin

    def until_state(self, *states: str) -> float:
        return self.until(f"job {self.number} {states}", lambda: self.show("JobState") in states)

    def until_ended(self) -> tuple[str, str]:
        """(state, exit code of the batch script)."""
        self.until_state("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.show("JobState"), self.show("ExitCode").split(":")[0]

    def processes(self, word: str) -> list[psutil.Process]:
        """This job's processes whose command line contains ``word``, as seen from outside the nodes."""
        found = []
        for process in psutil.process_iter():
            try:
                if word in " ".join(process.cmdline()) and self.number == process.environ().get("SLURM_JOB_ID"):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def ranks(self, program: str = "recipes.train") -> dict[str, psutil.Process]:
        """The learner's processes by rank, without a rank's newly forked children, which have the same command line."""
        found = {process.pid: process for process in self.processes(program)}
        ranks = {}
        for process in found.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.ppid() not in found and "heartbeat.py" not in command_line(process):
                    ranks[process.environ().get("RANK", "")] = process
        ranks.pop("", None)  # task.sh, srun
        return ranks


@dataclass
class Site:
    """The cluster with a site.env for this Python."""

    cluster: Cluster
    folder: Path
    model: Path

    def submit(self, name: str, *words: str, nodes: str = "node1", options: tuple[str, ...] = (), **env: str) -> Job:
        """`sbatch` the smoke test's template on these nodes ("": one, any); by default one learner rank, no servers."""
        count = len(nodes.split(","))
        variables = {
            "LEARNER_NODES": str(count),
            "ROLLOUT_NODES": "0",
            "SITE_ENV": str(self.folder / "site.env"),
            **env,
        }
        run, out = self.folder / name, self.folder / f"{name.replace('/', '-')}.out"
        where = (f"--nodelist={nodes}",) if nodes else ()
        options = (f"--nodes={count}", *where, f"--output={out}", "--mem=2G", *options)
        command = ["sbatch", "--parsable", *options, "slurm/smoke_cpu.sbatch", f"model.path={self.model}"]
        environment = {k: v for k, v in self.cluster.env.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
        done = subprocess.run(
            [*command, f"run.dir={run}", *words], cwd=ROOT, env=environment | variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return Job(done.stdout.strip(), self.cluster, out, run)
