"""Short training runs for the end-to-end tests: a random tiny model, the local engine, random rewards.

Rewards are random because a random model solves nothing, and without a reward difference nothing is trained.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

TIMEOUT_S = 240.0
SETTINGS = (
    *("rollout.engine=local", "reward.name=random", "optim.lr=2e-3", "run.report_every=0"),
    *("rollout.prompts_per_step=4", "rollout.n=4", "rollout.max_tokens=12", "train.steps=4"),
    *(
        "train.mini_batch_prompts=2",
        "eval.every=2",
        "eval.problems=4",
        "eval.n=2",
        "eval.k=[1,2]",
        "train.entropy_probe_every=2",
    ),
)


def arguments(model: Path, run_dir: Path, *extra: str) -> list[str]:
    """A command line; ``extra`` overrides the defaults."""
    return [f"model.path={model}", f"run.dir={run_dir}", *SETTINGS, *extra]


def launch_here(words: list[str]) -> int:
    """The command line in this process; its exit status. Leaves no process group and no signal handler behind."""
    from recipes.launch import launch
    from recipes.train import train

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        return launch(train, words)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _leave_groups()


def _leave_groups() -> None:
    """Destroy process groups that a failed run has left open."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def run_here(model: Path, run_dir: Path, *extra: str) -> Path:
    """Run a command that must succeed; return its directory."""
    assert launch_here(arguments(model, run_dir, *extra)) == 0
    return run_dir


def run_ranks(processes: int, model: Path, run_dir: Path, *extra: str) -> Path:
    """Run a command that must succeed in several ranks, without the launcher and torchrun; return its directory."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    words, log = arguments(model, run_dir, *extra), run_dir.with_suffix(".log")
    own = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    ranks = [start(words, log, partial(set_environment, variables)) for variables in own]
    try:
        for rank in ranks:
            rank.join(TIMEOUT_S)
        assert [rank.exitcode for rank in ranks] == [0] * processes, log.read_text()
    finally:
        for rank in ranks:
            rank.kill()
    return run_dir


def set_environment(variables: dict[str, str]) -> None:
    os.environ |= variables


def start(words: list[str], log: Path, fault: Callable[[], None] | None = None) -> Any:
    """Run the command line in a new process, forked from one with all imports done.

    ``fault`` is called first there, to patch something; a module-level function, or a partial of one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recipes.train", "recipes.rollout.local", "megatron_ext.learner.checkpoint"])
    process = context.Process(target=_child, args=(words, log, fault))
    process.start()
    return process


def _child(words: list[str], log: Path, fault: Callable[[], None] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    no_report()
    if fault is not None:
        fault()
    sys.exit(launch_here(words))


def no_report() -> None:
    """Disable reports: they take most of the time of a short run, and have their own tests."""
    from recipes.loop import run_dir

    run_dir.RunDir._report = lambda self: self.path / "report.html"  # type: ignore[method-assign]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without fields that depend on the machine's speed."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))} for row in rows]


def weights(run_dir: Path) -> dict[str, Any]:
    """Tensors of the exported policy."""
    found: dict[str, Any] = {}
    for path in sorted((run_dir / "hf").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def journal(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, their groups as plain lists."""
    from recipes.loop.journal import as_groups, records

    return [
        record.about | ({"groups": as_groups(record)} if record.about["kind"] == "rollouts" else {})
        for record in records(run_dir)
    ]


def assert_same_run(a: Path, b: Path) -> None:
    """Metrics and exported weights of two runs are equal bit for bit."""
    import torch

    rows_a, rows_b = metrics(a), metrics(b)
    assert [row["step"] for row in rows_a] == [row["step"] for row in rows_b]
    for row_a, row_b in zip(rows_a, rows_b, strict=True):
        different = {
            k: (row_a.get(k), row_b.get(k)) for k in row_a.keys() | row_b.keys() if row_a.get(k) != row_b.get(k)
        }
        assert not different, f"step {row_a['step']}: {different}"
    weights_a, weights_b = weights(a), weights(b)
    assert weights_a.keys() == weights_b.keys() and weights_a
    assert [name for name in weights_a if not torch.equal(weights_a[name], weights_b[name])] == []
