"""A reward worker: JSON lines in, JSON lines out, started and killed by `recipes.rewards.pool`.

Two processes. The first loads the verifier, gives up what `recipes.rewards.sandbox` takes, and never reads untrusted
text; it forks the second, which judges. When that one dies of a response, the first says so and forks the next one,
which is ready at once.

One request ``[number, text, gold, truncated, key]`` per line, one answer ``[number, score, correct, status, answer]``
per line, or ``["died", signal]``. The first line written says that the worker is ready, or why it is not.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import sys
from typing import Any, BinaryIO

from recipes.rewards import sandbox
from recipes.rewards.custom import Custom
from recipes.rewards.types import INVALID, RewardItem, Verifier
from recipes.rewards.verifiers import make_verifier

HEADROOM_MB = 128  # of address space, for the work itself
WARM_UP = RewardItem(text=r"\boxed{x^2+x}", gold="x(x+1)")  # loads all of math-verify
_PR_SET_PDEATHSIG = 1


def open_private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the protocol off descriptors 0 and 1, so that a library that prints cannot corrupt it."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    return requests, answers


def serve(verifier: Verifier, *, timeout_s: float, memory_mb: int, pipes: tuple[BinaryIO, BinaryIO]) -> None:
    """Answer requests until the pool closes the pipe. Imports come first, then limits, then untrusted text.

    A function of the user's own is imported behind the limits, too.

    ``timeout_s``: CPU seconds for one response; the kernel ends the judging process when they are used up.
    """
    if not isinstance(verifier, Custom):
        verifier(WARM_UP)
    sandbox.limit_resources(memory_mb)
    _check_headroom(memory_mb)
    sandbox.forbid_writes_and_network()
    if isinstance(verifier, Custom):
        verifier.load()
    _supervise(verifier, timeout_s, pipes)


def _supervise(verifier: Verifier, timeout_s: float, pipes: tuple[BinaryIO, BinaryIO]) -> None:
    _write(pipes[1], {"ready": True})
    supervisor = os.getpid()
    while True:
        child = os.fork()
        if child == 0:
            try:
                _judge(verifier, timeout_s, pipes, supervisor)
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return
        _write(pipes[1], ["died", code])


def _judge(verifier: Verifier, timeout_s: float, pipes: tuple[BinaryIO, BinaryIO], supervisor: int) -> None:
    requests, answers = pipes
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:
        return
    sandbox.forbid_processes()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in requests:
        sandbox.limit_cpu(timeout_s + 1)
        signal.setitimer(signal.ITIMER_PROF, timeout_s)
        number, text, gold, truncated, key = json.loads(line)
        try:
            result = verifier(RewardItem(text=text, gold=gold, truncated=truncated, key=key))
            answer: list[Any] = [number, result.score, result.correct, result.status, result.answer]
        except Exception:  # an error of the verifier on unusual text is an answer, not a crash
            answer = [number, 0.0, False, INVALID, None]
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answers, answer)


def _check_headroom(memory_mb: int) -> None:
    """Refuse to start with too little memory: such a worker would judge every answer as wrong."""
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
    sys.path += settings.get("paths", [])
    try:
        verifier = make_verifier(settings["name"], **settings["params"])
        serve(verifier, timeout_s=settings["timeout_s"], memory_mb=settings["memory_mb"], pipes=pipes)
    except Exception as error:
        _write(pipes[1], {"ready": False, "error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
