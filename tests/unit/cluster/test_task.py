"""The command prefix that slurm/task.sh adds to a learner rank."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

TASK = Path(__file__).resolve().parents[3] / "slurm" / "task.sh"


@pytest.mark.parametrize(
    ("rank", "words", "recorded"),
    [
        (0, ["run.profile=nsys"], True),
        (1, ["run.profile=nsys"], False),
        (1, ["run.profile=nsys", "run.profile_ranks=[0,1]"], True),
        (0, ["run.profile=nsys", "run.profile_ranks=[10, 1]"], False),
        (0, ["run.profile=torch"], False),
    ],
)
def test_ranks_that_nsys_starts(rank: int, words: list[str], recorded: bool) -> None:
    function = TASK.read_text().split("\nprofiler() {", 1)[1].split("\n}\n", 1)[0]
    script = f'profiler() {{{function}\n}}\nprofiler "$@"; echo "${{PROFILER[@]}}"'
    environment = {"SLURM_PROCID": str(rank), "ATTEMPT_DIR": "/run/logs"}
    command = ["/bin/bash", "-eu", "-c", script, "task", *words]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.strip()
    assert bool(found) == recorded
    if recorded:
        assert "--capture-range=cudaProfilerApi" in found and found.endswith(f"-o /run/logs/nsys-rank{rank}")
