"""Build the rollout engine that the configuration names."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.rollout.engine import RolloutEngine
from recipes.rollout.local import LocalEngine
from recipes.rollout.vllm.pool import PoolOptions, VLLMPool
from recipes.rollout.vllm.server import ServerOptions, server_gpus

ENGINES = ("auto", "vllm", "local")


def make_engine(
    engine: str,
    model_dir: Path,
    *,
    num_servers: int,
    urls: Sequence[str],
    max_model_len: int,
    max_num_seqs: int,
    dtype: str,
    log_dir: Path,
    **options: Any,
) -> RolloutEngine:
    """Start (or attach to) a rollout engine serving ``model_dir`` as version 0.

    Args:
        engine: "vllm", "local", or "auto": vLLM if it can be imported or ``urls`` are given, else local.
        num_servers: vLLM servers to start on this host, one core each on a CPU; unused with ``urls``.
        urls: running servers instead, their token in the environment variable VLLM_API_KEY.
        max_model_len: tokens of prompt and response together.
        max_num_seqs: sequences that one server, or the local engine, decodes at a time.
        dtype: "float32", "bfloat16" or "auto" (as in the checkpoint). The local engine computes in float32.
        log_dir: gets one log file per server.
        options: of `PoolOptions` and `ServerOptions`, ignored by the local engine.

    Raises:
        ValueError: for settings that cannot work. RuntimeError: when a server does not start, with its log's end.
    """
    if engine not in ENGINES:
        raise ValueError(f"rollout.engine={engine!r}: use one of {', '.join(ENGINES)}")
    if not (model_dir / "config.json").is_file():
        raise ValueError(f"model.path={model_dir}: no config.json there; give a Hugging Face model directory")
    have_vllm = importlib.util.find_spec("vllm") is not None
    if engine == "auto":
        engine = "vllm" if have_vllm or urls else "local"
        if engine == "local":
            print("rollout.engine=auto: vLLM is not installed, so rollouts come from the local engine (slower)")
    if engine == "local":
        return LocalEngine(model_dir, max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    if not have_vllm and not urls:
        raise ValueError("rollout.engine=vllm: vLLM is not installed; install it, or set rollout.engine=local")
    pool = {key: options.pop(key) for key in list(options) if key in PoolOptions.__dataclass_fields__}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        learner = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        options["gpus"] = server_gpus(visible.split(","), learner, colocated=options.get("sleep_mode", False))
    server = ServerOptions(model_dir, max_model_len, max_num_seqs, dtype, device, **options)
    return VLLMPool(server, PoolOptions(**pool), num_servers=num_servers, urls=urls, log_dir=log_dir)
