"""Build the rollout engine that the configuration names."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from configs.schema import RolloutConfig
from megatron_ext.sync import ipc
from recipes.rollout.engine import RolloutEngine
from recipes.rollout.local import LocalEngine
from recipes.rollout.vllm.pool import VLLMPool
from recipes.rollout.vllm.server import Place, server_gpus

ENGINES = ("auto", "vllm", "local")


def make_engine(rollout: RolloutConfig, model_dir: Path, log_dir: Path) -> RolloutEngine:
    """Start (or attach to) a rollout engine that serves ``model_dir`` as version 0.

    The engine "auto" is vLLM if it can be imported or ``rollout.urls`` are given, else local, which computes in
    float32. ``log_dir`` gets one log file per server.

    Raises:
        ValueError: for settings that cannot work. RuntimeError: when a server does not start, with its log's end.
    """
    engine = rollout.engine
    if engine not in ENGINES:
        raise ValueError(f"rollout.engine={engine!r}: use one of {', '.join(ENGINES)}")
    if not (model_dir / "config.json").is_file():
        raise ValueError(f"model.path={model_dir}: no config.json there; give a Hugging Face model directory")
    have_vllm = importlib.util.find_spec("vllm") is not None
    if engine == "auto":
        engine = "vllm" if have_vllm or rollout.urls else "local"
        if engine == "local":
            print("rollout.engine=auto: vLLM is not installed, so rollouts come from the local engine (slower)")
    if engine == "local":
        return LocalEngine(model_dir, max_model_len=rollout.max_model_len, max_num_seqs=rollout.max_num_seqs)
    if not have_vllm and not rollout.urls:
        raise ValueError("rollout.engine=vllm: vLLM is not installed; install it, or set rollout.engine=local")
    if not torch.cuda.is_available():
        if rollout.quantization is not None and not rollout.urls:
            raise ValueError(
                f"rollout.quantization={rollout.quantization} needs GPUs, and there is none here: set it to null"
            )
        return VLLMPool(rollout, Place(model_dir, log_dir))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    learner = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = server_gpus(visible.split(","), learner, colocated=rollout.colocated)
    rollout = dataclasses.replace(rollout, weight_sync=choose_sync(rollout, gpus, visible.split(",")[0]))
    return VLLMPool(rollout, Place(model_dir, log_dir, "cuda", gpus))


def choose_sync(
    rollout: RolloutConfig, gpus: Sequence[str], mine: str
) -> Literal["auto", "disk", "ipc", "nccl", "gloo"]:
    """The transport on a machine with GPUs. "auto" becomes "ipc" where all servers use the GPU of the learner's rank 0,
    and take turns with it, if processes can share its memory.

    Args:
        gpus: of the servers; ``mine``: that of rank 0.

    Raises ValueError for "ipc" with other GPUs.
    """
    shared = not rollout.urls and set(gpus[: rollout.num_servers * rollout.server_gpus]) == {mine}
    if rollout.weight_sync == "auto" and rollout.colocated and shared:
        why = ipc.problem()
        if why is None:
            return "ipc"
        print(f"rollout.weight_sync=auto: weights go by files, since processes here cannot share GPU memory ({why})")
    if rollout.weight_sync == "ipc" and not shared:
        raise ValueError(
            f"rollout.weight_sync=ipc needs all servers on GPU {mine}, that of the learner's first rank, and they have "
            f"{', '.join(gpus)}: set rollout.weight_sync=auto"
        )
    return rollout.weight_sync
