"""Choose the checkpoint from which a run continues: ``resume=latest`` or ``resume=latest_valid``.

"latest" continues from the checkpoint that the pointer file names. If it is damaged, an error names the newest intact
checkpoint and the key that continues from it. "latest_valid" continues from that one: it renames damaged checkpoints,
prints a message, and updates the pointer. Nothing is deleted, and a run never goes back silently.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from conversion.publish import ManifestError
from megatron_ext.learner import checkpoint, control
from megatron_ext.learner.critic import Critic
from megatron_ext.learner.learner import Learner

DAMAGED = ".damaged"  # suffix of a checkpoint that "latest_valid" has set aside


def resume(learner: Learner, root: Path, mode: str, *, critic: Critic | None = None) -> dict[str, Any] | None:
    """Restore the run's last checkpoint and return its state; None if there is none yet. A collective.

    Raises ValueError in one sentence, on every rank.
    """
    found = _look(root)  # rank 0's view: file servers may show others an older one
    if not found["checkpoints"] and found["pointer"] is None:
        return None
    if mode == "latest":
        try:
            if found["error"]:
                raise ManifestError(found["error"])
            return checkpoint.load(learner, root / found["pointer"], critic=critic)
        except ManifestError as error:
            intact = _newest_intact(root, [name for name in found["checkpoints"] if name != found["pointer"]])
            raise ManifestError(f"{error}. {_advice(intact)}") from error
    for name in reversed(found["checkpoints"]):
        try:
            state = checkpoint.load(learner, root / name, critic=critic)
        except ManifestError as error:
            if dist.get_rank() == 0:
                print(f"resume=latest_valid: {error}; set aside as {set_aside(root / name).name}", flush=True)
            control.barrier()
            continue
        if dist.get_rank() == 0:
            if name != found["pointer"]:
                print(f"resume=latest_valid: continuing from {name}, not from {found['pointer']}", flush=True)
            checkpoint.point_to(root, name)
        return state
    raise ManifestError(f"no intact checkpoint in {root}: {_advice(None)}")


def set_aside(directory: Path) -> Path:
    """Rename a damaged checkpoint out of the way; its new name."""
    number = 0
    while (target := directory.with_name(f"{directory.name}{DAMAGED}{number or ''}")).exists():
        number += 1
    directory.rename(target)
    return target


def _look(root: Path) -> dict[str, Any]:
    """Names of all checkpoints by write order, the pointer's content or None, and what is wrong with it or ""."""
    found: dict[str, Any] = {}
    if dist.get_rank() == 0:
        found = {"checkpoints": [path.name for path in checkpoint.by_write_order(root)], "pointer": None, "error": ""}
        try:
            latest = checkpoint.find_latest(root)
            found["pointer"] = latest.name if latest else None
        except ValueError as error:
            found["error"], found["pointer"] = str(error), "what the pointer names"
        if len(found["checkpoints"]) == 1 and found["pointer"] is None:
            # The first one of a run, which was killed before it wrote the pointer.
            (only,) = found["checkpoints"]
            print(f"{root}: there is no pointer yet, continuing from {only}", flush=True)
            checkpoint.point_to(root, only)
            found["pointer"] = only
        if found["checkpoints"] and found["pointer"] is None:
            found["error"] = f"{root / checkpoint.LATEST} is missing, although there are checkpoints"
            found["pointer"] = "what the pointer named"
    answer: dict[str, Any] = json.loads(control.broadcast_bytes(json.dumps(found).encode(), src=0))
    return answer


def _newest_intact(root: Path, names: list[str]) -> str | None:
    for name in reversed(names):
        try:
            checkpoint.verified_manifest(root / name)
        except ManifestError:
            continue
        return name
    return None


def _advice(intact: str | None) -> str:
    again = "to start from the beginning set run.dir to a new directory"
    if intact is None:
        return f"There is no other intact checkpoint; restore one, or {again}"
    return f"The newest intact checkpoint is {intact}: resume=latest_valid continues from it; {again}"
