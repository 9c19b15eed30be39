"""Scores responses in worker processes, which may hang, crash or exhaust memory without harm to the run.

A response that uses up its CPU time or kills the process that judges it gets ``failure_score`` and is counted; the next
response finds a warm process. Limits are enforced by the kernel, because none inside a Python process holds while C
code multiplies big integers; a worker that only sleeps is killed from outside, with its whole process group.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from megatron_ext import progress
from recipes.rewards.custom import NAME
from recipes.rewards.types import CRASH, INVALID, OK, TIMEOUT, RewardItem, RewardResult, Verifier
from recipes.rewards.verifiers import make_verifier

STARTUP_TIMEOUT_S = 120.0  # importing a computer algebra system on a busy machine takes seconds
CLOCK_FACTOR = 10.0
MAX_ANSWER_BYTES = 4096
_STATUSES = (OK, TIMEOUT, CRASH, INVALID)


class WorkerDied(Exception):
    """The worker ended, or sent an invalid answer: it must be replaced."""


class JudgeDied(Exception):
    """The judging process ended; the worker has another one ready. ``timeout``: it had used up its CPU time."""

    def __init__(self, timeout: bool) -> None:
        super().__init__("the judging process ended")
        self.timeout = timeout


class Scorer(Protocol):
    """Interface of a scorer for the training loop."""

    counts: Counter[str]  # results so far by status

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]: ...

    def close(self) -> None: ...


def make_scorer(
    name: str,
    params: dict[str, Any] | None = None,
    *,
    workers: int = 1,
    timeout_s: float = 1.5,
    memory_mb: int = 2048,
    failure_score: float = 0.0,
) -> Scorer:
    """A scorer for the named verifier: in this process if the verifier is harmless, else a `RewardPool`."""
    verifier = make_verifier(name, **(params or {}))
    if verifier.in_process:
        return InProcessScorer(verifier)
    return RewardPool(
        name, params, workers=workers, timeout_s=timeout_s, memory_mb=memory_mb, failure_score=failure_score
    )


class InProcessScorer:
    """For verifiers that only compare strings."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self.counts: Counter[str] = Counter()

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """One result per item, in order."""
        results = [self._verifier(item) for item in items]
        self.counts.update(result.status for result in results)
        return results

    def close(self) -> None:
        """Nothing to release."""


class Worker:
    """One worker process and the two pipes to it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_worker_environment(),
            cwd="/",
            start_new_session=True,  # own process group: children of a worker die with it
        )
        self._kill = weakref.finalize(self, _kill_group, self._process)
        assert self._process.stdin and self._process.stdout
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)
        self.served = 0  # by the process that judges now
        self._number = 0
        self._ready = False

    def wait_ready(self) -> None:
        """Raises ``RuntimeError`` with the worker's message if it cannot start."""
        if self._ready:
            return
        try:
            message = self._exchange(b"", STARTUP_TIMEOUT_S)
        except TimeoutError as error:
            raise RuntimeError(f"the reward worker did not come up within {STARTUP_TIMEOUT_S:.0f} s") from error
        except WorkerDied as error:
            raise RuntimeError(f"the reward worker cannot start ({error}): is reward.memory_mb too small?") from error
        if not isinstance(message, dict) or message.get("ready") is not True:
            said = message.get("error", message) if isinstance(message, dict) else message
            raise RuntimeError(f"the reward worker cannot start: {said}")
        self._ready = True

    def ask(self, item: RewardItem, timeout_s: float) -> RewardResult:
        """The worker's verdict, within ``timeout_s`` on the clock.

        Raises ``JudgeDied`` when the response killed the process that judged it, and ``TimeoutError`` or ``WorkerDied``
        when the worker can no longer be used.
        """
        self._number += 1
        request = json.dumps([self._number, item.text, item.gold, item.truncated, item.key]).encode() + b"\n"
        answer = self._exchange(request, timeout_s)
        if isinstance(answer, list) and len(answer) == 2 and answer[0] == "died":
            self.served = 0
            raise JudgeDied(answer[1] in (-signal.SIGPROF, -signal.SIGXCPU))
        self.served += 1
        if not (isinstance(answer, list) and len(answer) == 5 and answer[0] == self._number):
            raise WorkerDied("malformed answer")
        _, score, correct, status, read = answer
        if not isinstance(score, (int, float)) or not math.isfinite(score) or status not in _STATUSES:
            raise WorkerDied("malformed answer")
        return RewardResult(float(score), bool(correct), status, read if isinstance(read, str) else None)

    def kill(self) -> None:
        """SIGKILL to the whole process group. May be called twice."""
        self._kill()

    def _exchange(self, request: bytes, timeout_s: float) -> Any:
        """Write ``request``, then read one line, both within ``timeout_s``: a hung worker can block neither."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        deadline, unsent, received = time.monotonic() + timeout_s, memoryview(request), b""
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if unsent:
                selector.register(stdin, selectors.EVENT_WRITE)
            while not received.endswith(b"\n"):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError
                for key, _ in selector.select(remaining):
                    if key.fileobj is stdin:
                        unsent = unsent[_write_some(stdin.fileno(), unsent) :]
                        if not unsent:
                            selector.unregister(stdin)
                        continue
                    chunk = os.read(stdout.fileno(), MAX_ANSWER_BYTES)
                    received += chunk
                    if not chunk or len(received) > MAX_ANSWER_BYTES:
                        raise WorkerDied("the process ended" if not chunk else "oversized answer")
        try:
            return json.loads(received)
        except ValueError as error:
            raise WorkerDied("malformed answer") from error


class RewardPool:
    """Scores with ``workers`` processes of the named verifier. They start at the first use and stay warm.

    Args:
        name, params: the verifier, as for `make_verifier`.
        workers: processes.
        timeout_s: CPU seconds for one response, enforced by the kernel: a busy machine changes no verdict. On the
            clock it may take `CLOCK_FACTOR` times as long; then the worker is killed and replaced.
        memory_mb: address space of a worker in MiB.
        failure_score: score of a response whose worker timed out or died, or whose verifier raised an error.
        command: start this program instead of `recipes.rewards.worker` (for tests).

    ``counts`` has the number of results by status, ``restarts`` the number of processes replaced.
    """

    def __init__(
        self,
        name: str,
        params: dict[str, Any] | None = None,
        *,
        workers: int = 1,
        timeout_s: float = 1.5,
        memory_mb: int = 2048,
        failure_score: float = 0.0,
        command: Sequence[str] | None = None,
    ) -> None:
        for key, value in (("workers", workers), ("timeout_s", timeout_s), ("memory_mb", memory_mb)):
            if value <= 0:
                raise ValueError(f"reward.{key} must be positive, not {value}")
        make_verifier(name, **(params or {}))  # report a wrong name or parameter now, not from a worker
        settings = {"name": name, "params": params or {}, "timeout_s": timeout_s, "memory_mb": memory_mb}
        if NAME.fullmatch(name):  # where the user's module may lie; nothing else of the environment is passed on
            paths = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
            settings["paths"] = [os.path.abspath(path) for path in paths if path]
        self._command = list(command or [sys.executable, "-m", "recipes.rewards.worker", json.dumps(settings)])
        self._timeout_s = timeout_s
        self._failure_score = failure_score
        self._slots: list[Worker | None] = [None] * workers
        self._lock = threading.Lock()  # one `score` call at a time
        self._restarts_lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.restarts = 0

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """One result per item, in order. Raises ``RuntimeError`` when workers cannot be started at all."""
        with self._lock:
            results: list[RewardResult | None] = [None] * len(items)
            todo = iter(enumerate(items))
            todo_lock = threading.Lock()

            def drain(slot: int) -> None:
                while True:
                    with todo_lock:
                        index, item = next(todo, (None, None))
                    if index is None or item is None:
                        return
                    results[index] = self._judge(slot, item)
                    progress.beat(phase="rollout")

            slots = range(min(len(self._slots), len(items)))
            with ThreadPoolExecutor(max(1, len(slots))) as threads:
                for finished in [threads.submit(drain, slot) for slot in slots]:
                    finished.result()
            done = [result for result in results if result is not None]
            assert len(done) == len(items)
            self.counts.update(result.status for result in done)
            return done

    def start(self) -> None:
        """Start one worker now. Raises ValueError in its own words when it cannot."""
        worker = self._slots[0] = self._slots[0] or Worker(self._command)
        try:
            worker.wait_ready()
        except RuntimeError as error:
            self.close()
            raise ValueError(str(error)) from error

    def close(self) -> None:
        """Kill the workers. The pool starts new ones when it is used again."""
        for slot, worker in enumerate(self._slots):
            if worker is not None:
                worker.kill()
            self._slots[slot] = None

    def _judge(self, slot: int, item: RewardItem) -> RewardResult:
        """Verdict on one item. If a worker dies that has served other items, the item gets one more try on a new
        worker, so that the result does not depend on the other items."""
        while True:
            worker = self._slots[slot] or Worker(self._command)
            self._slots[slot] = worker
            try:
                worker.wait_ready()
            except RuntimeError:
                worker.kill()
                self._slots[slot] = None
                raise
            was_fresh = worker.served == 0
            try:
                result = worker.ask(item, CLOCK_FACTOR * self._timeout_s)
            except JudgeDied as error:
                self._count_restart()
                if error.timeout or was_fresh:
                    return self._failed(TIMEOUT if error.timeout else CRASH)
                continue
            except (TimeoutError, WorkerDied) as error:
                self._replace(slot)
                if isinstance(error, TimeoutError) or was_fresh:
                    return self._failed(TIMEOUT if isinstance(error, TimeoutError) else CRASH)
                continue
            return result if result.status == OK else self._failed(result.status)

    def _failed(self, status: str) -> RewardResult:
        return RewardResult(self._failure_score, False, status)

    def _replace(self, slot: int) -> None:
        """Kill the worker and start a new one, which loads its libraries while others work."""
        worker = self._slots[slot]
        assert worker is not None
        worker.kill()
        self._slots[slot] = Worker(self._command)
        self._count_restart()

    def _count_restart(self) -> None:
        with self._restarts_lock:
            self.restarts += 1


def _write_some(descriptor: int, data: memoryview) -> int:
    try:
        return os.write(descriptor, data)
    except BrokenPipeError as error:
        raise WorkerDied("the process ended") from error


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the worker leads its group, which outlives it while it has members
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _worker_environment() -> dict[str, str]:
    """An environment without our variables and secrets. A fixed hash seed makes sympy's orderings repeatable."""
    root = str(Path(__file__).resolve().parents[2])
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": root,
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
    }
