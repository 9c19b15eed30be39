"""Profiles of whole learner steps, from statistics to the last update: ``run.profile``.

``torch``: a trace by torch's profiler per step and rank, ``run.dir/profile/step_000003_rank_0.json.gz``, for Perfetto
(ui.perfetto.dev) or chrome://tracing. ``nsys``: Nsight Systems records between the calls that are made here, with a
range for each phase and operation; the process has to be started by it (`NSYS`; the Slurm templates do so).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from configs.schema import Config

DIRECTORY = "profile"
NSYS = "nsys profile --capture-range=cudaProfilerApi --capture-range-end=repeat --trace=cuda,nvtx,osrt -o FILE"


def check_profile(config: Config, rank: int, world: int) -> None:
    """Raises ValueError for ranks or steps that do not exist, and for nsys where no nsys listens."""
    run = config.run
    if run.profile is None:
        return
    for key, values, first, last in (
        ("run.profile_steps", run.profile_steps, 1, config.train.steps),
        ("run.profile_ranks", run.profile_ranks, 0, world - 1),
    ):
        if bad := [value for value in values if not first <= value <= last]:
            raise ValueError(f"{key}={values}: {bad[0]} is not between {first} and {last}")
    if run.profile == "nsys" and rank in run.profile_ranks and "NSYS_PROFILING_SESSION_ID" not in os.environ:
        raise ValueError(
            f"run.profile=nsys, but rank {rank} was not started by nsys: put `{NSYS}` in front of the command, or set "
            "run.profile=torch"
        )


@contextmanager
def profiled(config: Config, rank: int, step: int) -> Iterator[None]:
    """Record what happens inside, if this step (counted from 0) of this rank is to be recorded."""
    run = config.run
    if run.profile is None or step + 1 not in run.profile_steps or rank not in run.profile_ranks:
        yield
    elif run.profile == "nsys":
        with torch.autograd.profiler.emit_nvtx():
            torch.cuda.profiler.start()
            yield
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
    else:
        with torch.profiler.profile() as recorded:  # of the CPU, and of the GPU if there is one
            yield
        directory = Path(run.dir) / DIRECTORY
        directory.mkdir(exist_ok=True)
        file = directory / f"step_{step + 1:06d}_rank_{rank}.json.gz"
        partial = file.with_name(f".partial_{file.name}")  # the profiler compresses what ends in .gz
        recorded.export_chrome_trace(str(partial))
        partial.replace(file)
