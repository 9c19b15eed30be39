"""Whether this machine has enough processes, memory and GPUs for a configuration."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

import conversion
from configs.layout import learner_processes
from configs.schema import Config
from recipes.planning.memory import ITEM_BYTES, learner_memory, parameter_count

GIB = 1 << 30
LEARNER_BYTES, SERVER_BYTES, WORKER_BYTES = int(0.4 * GIB), int(1.2 * GIB), int(0.15 * GIB)  # imports alone, on a CPU


def check_machine(config: Config, hf: conversion.HFConfig) -> list[str]:
    """Remarks on what will be slow here. For a launch on one machine; under Slurm each node has its own checks.

    Raises:
        ValueError: more processes than GPUs, or less memory than the processes and the learner's state need.
    """
    processes = learner_processes(config)
    if torch.cuda.is_available():
        if processes > (gpus := torch.cuda.device_count()):
            raise ValueError(f"{_processes(config)}, and this machine has {gpus} GPUs: lower parallel.*, or use slurm/")
        return []
    needed, total = memory_needed(config, hf), memory_total()
    if needed > total:
        raise ValueError(
            f"{_processes(config)}{_servers(config)}, {needed / GIB:.1f} GiB at least, and this machine has "
            f"{total / GIB:.1f} GiB: lower parallel.*, rollout.num_servers or reward.workers, or take a smaller model"
        )
    cores, remarks = len(os.sched_getaffinity(0)), []
    if processes > cores:
        remarks.append(f"{_processes(config)}, which take turns on {cores} cores")
    elif processes * config.train.threads > cores:
        remarks.append(
            f"train.threads={config.train.threads} x {processes} learner processes are more than {cores} cores"
        )
    return remarks


def memory_needed(config: Config, hf: conversion.HFConfig) -> int:
    """Bytes on one machine without GPUs: imports of all processes, the learner's state, the servers' weights."""
    learner = learner_memory(config, hf)
    state = learner.weights + learner.gradients + learner.optimizer
    r, servers = config.rollout, 0
    if r.replay is None and not r.urls and r.engine != "local":
        item = ITEM_BYTES.get(r.dtype, 2)
        servers = r.num_servers * (SERVER_BYTES + parameter_count(hf) * item)
    return int(learner_processes(config) * (LEARNER_BYTES + state) + servers + config.reward.workers * WORKER_BYTES)


def memory_total(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of this machine's memory, or of its container's limit where that is lower."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int((cgroup / "memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return total


def _processes(config: Config) -> str:
    processes = learner_processes(config)
    return f"parallel.* asks for {processes} learner process{'es' * (processes > 1)}"


def _servers(config: Config) -> str:
    r = config.rollout
    return "" if r.urls or r.engine == "local" else f" and {r.num_servers} rollout server{'s' * (r.num_servers > 1)}"
