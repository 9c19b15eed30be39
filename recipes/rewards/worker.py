"""A reward worker process: JSON lines in, JSON lines out, started and killed by `recipes.rewards.pool`.

One request ``[text, gold, truncated, key]`` per line, one answer ``[score, correct, status, answer]`` per line. The
first line written says that the worker is ready, or why it is not.
"""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any, BinaryIO

from recipes.rewards import sandbox
from recipes.rewards.types import INVALID, RewardItem, Verifier
from recipes.rewards.verifiers import make_verifier

HEADROOM_MB = 128  # of address space, for the work itself


def open_private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the protocol off descriptors 0 and 1, so that a library that prints cannot corrupt it."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    return requests, answers


def serve(verifier: Verifier, *, timeout_s: float, memory_mb: int, pipes: tuple[BinaryIO, BinaryIO]) -> None:
    """Answer requests until the pool closes the pipe. Imports first, then limits, then untrusted text."""
    requests, answers = pipes
    warm_up = r"\boxed{\frac{1}{2}}"
    verifier(RewardItem(text=warm_up, gold="0.5"))
    sandbox.limit_resources(memory_mb)
    _check_headroom(memory_mb)
    sandbox.forbid_writes_and_network()
    _write(answers, {"ready": True})
    for line in requests:
        sandbox.limit_cpu(timeout_s + 1)
        text, gold, truncated, key = json.loads(line)
        try:
            result = verifier(RewardItem(text=text, gold=gold, truncated=truncated, key=key))
            answer: list[Any] = [result.score, result.correct, result.status, result.answer]
        except Exception:  # a verifier that trips over strange text is an answer, not a crash
            answer = [0.0, False, INVALID, None]
        _write(answers, answer)


def _check_headroom(memory_mb: int) -> None:
    """A worker that can barely load its libraries would call every answer wrong: refuse to start instead."""
    try:
        bytearray(HEADROOM_MB << 20)
    except MemoryError:
        raise MemoryError(f"less than {HEADROOM_MB} MiB left of reward.memory_mb={memory_mb}: raise it") from None


def _write(stream: BinaryIO, message: object) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def main() -> None:
    settings = json.loads(sys.argv[1])
    pipes = open_private_pipes()
    sys.stdout = sys.stderr = io.StringIO()
    try:
        verifier = make_verifier(settings["name"], **settings["params"])
        serve(verifier, timeout_s=settings["timeout_s"], memory_mb=settings["memory_mb"], pipes=pipes)
    except Exception as error:
        _write(pipes[1], {"ready": False, "error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
