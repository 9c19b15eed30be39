"""The interface of rollout engines. There are two:

``vllm``: stock vLLM servers over HTTP (`recipes.rollout.vllm.pool`). ``local``: the same weights in this process
(`recipes.rollout.local`), for tests and for machines without vLLM.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ext.rl.types import Rollout
from megatron_ext.sync.auth import TOKEN_VARIABLE
from megatron_ext.sync.base import Ranks


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    The model's own end-of-sequence tokens (``eos_token_id`` of config.json and generation_config.json) always stop;
    ``stop_token_ids`` adds to them. ``temperature`` 0 is greedy; ``top_k`` 0 samples from all tokens.

    Raises ValueError for temperature or top_p other than 1, or top_k, without ``allow_off_policy_sampling``: the
    policy-gradient ratio would compare two different distributions. Evaluation, and training with mismatch correction,
    pass it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    allow_off_policy_sampling: bool = False
    experts: bool = False  # return the experts of every token, where the model has some and the engine can

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: at least one token must be generated, set it to 1 or more")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature={self.temperature}, top_p={self.top_p}: give >= 0 and a share in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: give a number of tokens, or 0 for all")
        if (self.temperature, self.top_p, self.top_k) != (1.0, 1.0, 0) and not self.allow_off_policy_sampling:
            raise ValueError(
                f"temperature={self.temperature}, top_p={self.top_p}, top_k={self.top_k}: sampling for training needs "
                "temperature 1, top_p 1 and no top_k, else rollouts come from another distribution than the learner's; "
                "set both to 1, or pass allow_off_policy_sampling (evaluation, or training with mismatch correction)"
            )


@dataclass(eq=False)
class Request:
    """``n`` responses to one prompt. It may stay open over several calls of `RolloutEngine.complete`, and updates."""

    prompt: Sequence[int]
    n: int
    seed: int
    rollouts: list[Rollout] | None = None  # once all n are complete
    state: Any = None  # the engine's own, while the request is open


class RolloutEngine(Protocol):
    """A rollout engine. `generate` may run in several threads, also while `push` runs."""

    version: int  # of the weights it serves
    sync_seconds: dict[str, float]  # of the last `push`, by phase

    @property
    def counters(self) -> dict[str, int]:
        """Since the start, such as "requests", "retries", "server_failures"."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """``n`` responses per prompt, grouped in prompt order; one seed per prompt. Blocks until all are there."""
        ...

    def complete(self, requests: Sequence[Request], *, sampling: Sampling) -> Generator[list[Request], None, None]:
        """Yield requests as they complete, one or more at a time, until all are.

        Whoever stops asking closes the iterator. What is open then stays so: servers go on with it, an engine in this
        process halts it, and a later call with the same requests continues them. A response keeps the tokens that it
        has, each with its log-probability and the version of the weights that wrote it.
        """
        ...

    @property
    def staging_root(self) -> Path | None:
        """Directory in which other ranks of the learner may stage parts of an update; None: everything is in `push`."""

    def push(self, version: int, tensors: Iterable[tuple[str, Tensor]], ranks: Ranks | None = None) -> None:
        """Replace all weights by ``tensors`` (Hugging Face names) or raise WeightUpdateError; serve ``version``.

        ``ranks`` stage the tensors that are not among ``tensors``.
        """
        ...

    def close(self) -> None: ...


def request_seed(*key: object) -> int:
    """A seed in [0, 2^62) from anything printable: the same for the same key on every machine.

    Hashed, because vLLM gives sample i of a request ``seed + i``: with neighbouring seeds, samples of neighbouring
    prompts would share their random numbers.
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 2


def url_token() -> str:
    """The token of servers given by URL."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise ValueError(f"rollout.urls: set {TOKEN_VARIABLE} to the servers' token before starting")
    return token


def stop_tokens(model_dir: Path) -> set[int]:
    """End-of-sequence token ids in the model's own files. The same for every engine."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = model_dir / name
        value = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        found |= set(value) if isinstance(value, list) else set() if value is None else {value}
    return found


def check_request(prompts: Sequence[Sequence[int]], n: int, seeds: Sequence[int], max_model_len: int) -> None:
    """ValueError for requests that no engine can serve."""
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed per prompt")
    if n < 1:
        raise ValueError(f"n={n}: generate at least one response per prompt")
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < max_model_len:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens: need at least 1 and fewer than rollout.max_model_len="
                f"{max_model_len}; filter long prompts or raise rollout.max_model_len"
            )


def cast_floats(tensors: Iterable[tuple[str, Tensor]], dtype: str) -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in the servers' dtype, so that no bytes are sent to be rounded there; "auto": as is."""
    target = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
    for name, tensor in tensors:
        yield name, tensor.to(target) if target is not None and tensor.is_floating_point() else tensor
