"""`recipes.train` with a fault built in, for the drills: FAULT="KIND RANK STEP", in the first attempt of a job only."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_ext.learner.learner import Learner, NotFinite
from recipes.launch import launch
from recipes.train import train

KIND, RANK, STEP = (os.environ.get("FAULT", "none 0 0") + " 0 0").split()[:3]


def faulty(original: Any) -> Any:
    calls = 0

    def update(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > int(STEP) * 2 and os.environ["RANK"] == RANK and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            if KIND == "stuck":  # alive, with a heartbeat, but it never joins the others again
                # The action of NCCL's watchdog on a GPU, when torch is configured for it.
                Path(os.environ["TORCH_FR_DUMP_TEMP_FILE"] + RANK).write_bytes(b"a record of NCCL")
                while True:
                    time.sleep(0.1)
            if KIND == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if KIND == "nan":
                raise NotFinite("gradient")
            if KIND == "oom":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            if KIND == "assert":
                raise AssertionError("an invariant of the test")
            if KIND == "exit":
                os._exit(7)
        return original(*args, **kwargs)

    return update


if __name__ == "__main__":
    Learner.update = faulty(Learner.update)  # type: ignore[method-assign]
    sys.exit(launch(train))
