"""Shared by all tests: markers by folder, one thread per process, skips where the hardware is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import hypothesis
import pytest

# Two cores are shared by every process a test starts; must precede the first import of torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU Triton's kernels run in its interpreter; must precede the first import of triton.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Property tests have no deadline: a busy machine is not a defect.
hypothesis.settings.register_profile("developer", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)  # the same examples in each run
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "developer")

MARKED_FOLDERS = ("distributed", "e2e", "gpu")  # tests/<folder>/ carries the marker of the same name
# Files that take half a minute or more, longest first. Several test processes start with these, so that none of them is
# left alone with one at the end.
LONGEST = (
    *("slurm/test_jobs.py", "slurm/test_servers.py", "test_train_processes.py", "test_rollout_vllm.py"),
    *("slurm/test_gpu_templates.py", "test_reward_workers.py", "test_train_replay.py", "test_quickstart_gate.py"),
    *("test_resume.py", "test_terminal.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by folder, long files first. GPU tests are skipped, not failed, without a GPU."""
    here = Path(__file__).parent
    rank = {here / "e2e" / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(LONGEST)))
    for item in items:
        folder = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        if folder in MARKED_FOLDERS:
            item.add_marker(folder)
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
