"""A pool of vLLM servers behind `RolloutEngine`: dispatch, retries, weight versions. See docs/rollout.md.

The caller's side is synchronous; HTTP runs on an event loop in a thread of its own. One request carries one prompt and
all its samples; token ids go in and out, so nothing is tokenised twice.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import queue
import secrets
import threading
import time
from collections.abc import Coroutine, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from configs.schema import RolloutConfig
from megatron_ext import progress
from megatron_ext.rl.types import Rollout
from megatron_ext.sync.base import Ranks, WeightSync, WeightUpdateError, stage_weights
from megatron_ext.sync.broadcast import BroadcastSync
from megatron_ext.sync.disk import DiskSync
from megatron_ext.sync.ipc import IpcSync
from recipes.rollout.engine import Request, Sampling, cast_floats, check_request, request_seed, stop_tokens, url_token
from recipes.rollout.routing import FLAG, experts_of
from recipes.rollout.vllm.client import (
    GivenUp,
    Line,
    NoAnswer,
    Piece,
    Server,
    ServerError,
    most_connections,
    parse_answer,
    request_body,
)
from recipes.rollout.vllm.fleet import Fleet
from recipes.rollout.vllm.server import Place
from recipes.rollout.vllm.update import Updater

T = TypeVar("T")
ATTEMPTS = 3  # servers on which a request may fail before its prompt is blamed


@dataclass
class OpenRequest:
    """The pool's part of a `Request`. Only the event loop's thread changes it."""

    request: Request
    task: asyncio.Task[list[Rollout]]
    _listener: queue.SimpleQueue[Request] | None = None
    _told: bool = False

    def tell(self, listener: queue.SimpleQueue[Request]) -> None:
        """Put the request into ``listener`` once it is complete, and no longer into an earlier one."""
        if self._listener is None:
            self.task.add_done_callback(self._complete)
        elif self._told:
            listener.put(self.request)
        self._listener = listener

    def _complete(self, _: asyncio.Task[list[Rollout]]) -> None:
        assert self._listener is not None
        self._told = True
        self._listener.put(self.request)


def first_of(error: BaseException) -> BaseException:
    """Of the errors of a TaskGroup, the cause: the others follow from it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class VLLMPool:
    """`RolloutEngine` over HTTP.

    A server that fails a request, or whose engine does not answer, gets no further request until it has returned and
    confirmed the weights; its requests go to other servers. `generate` may be called from several threads at the same
    time, and while `push` runs: requests are dispatched in the order of the calls, and wait during an update.
    """

    def __init__(self, rollout: RolloutConfig, place: Place) -> None:
        if rollout.num_servers < 1 and not rollout.urls:
            raise ValueError(
                f"rollout.num_servers={rollout.num_servers}: start at least one server, or give rollout.urls"
            )
        self.version = 0
        self.sync_seconds: dict[str, float] = {}
        self._requests = {"requests": 0, "retries": 0, "continued": 0}
        self._rollout, self._place = rollout, place
        self._eos = stop_tokens(place.model_dir)
        self._experts = None if rollout.routing_replay is False else experts_of(place.model_dir)
        self._token = url_token() if rollout.urls else secrets.token_urlsafe(32)
        # The version of the weights in responses. It includes the checksum, so a server that was restarted, or got
        # weights from another program, is recognised.
        self._label = f"0-{secrets.token_hex(8)}"
        self._labels = {self._label: 0}
        self._holding = False  # no request is dispatched: an update is being delivered
        self._closed = False
        self._sync = make_sync(rollout, place.model_dir)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-http", daemon=True)
        self._thread.start()
        self._fleet: Fleet | None = None
        atexit.register(self.close)
        try:
            self._run(self._start())
        except BaseException:
            self.close()
            raise

    async def _start(self) -> None:
        self._line = Line()  # order of requests: the earliest requested batch first
        self._batches = itertools.count()
        self._connections = asyncio.Semaphore(most_connections())
        self._delivering = asyncio.Lock()  # to all servers, or to one that came back
        self._fleet = Fleet(self._rollout, self._place, token=self._token, initial_label=self._label, offer=self._offer)
        limits = {"timeout_s": self._rollout.update_timeout_s, "answer_s": self._rollout.probe_s}
        self._updater = Updater(self._sync, self._fleet.post, self._fleet.get, **limits)
        await self._fleet.start()

    @property
    def servers(self) -> list[Server]:
        return self._fleet.servers if self._fleet is not None else []

    @property
    def counters(self) -> dict[str, int]:
        """Since the start: requests, retries, continued (cut off by an update), server_failures, revived."""
        return self._requests | (self._fleet.counters if self._fleet is not None else {})

    # ---- generation -------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Sequence[int]], *, n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See `RolloutEngine`. RuntimeError when no server is left, or a prompt failed on three of them."""
        check_request(prompts, n, seeds, self._rollout.max_model_len)
        if sampling.temperature == 0 and n > 1:
            raise ValueError(f"n={n} with temperature=0: greedy responses are all the same, use n=1")
        requests = [Request(prompt, n, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        for _ in self.complete(requests, sampling=sampling):
            pass
        return [rollout for request in requests for rollout in request.rollouts or ()]

    def complete(self, requests: Sequence[Request], *, sampling: Sampling) -> Generator[list[Request], None, None]:
        """See `RolloutEngine`. The first request that fails ends the others, and is raised as by `generate`."""
        complete: queue.SimpleQueue[Request] = queue.SimpleQueue()
        left = sum(request.rollouts is None for request in requests)
        try:
            self._run(self._ask_all(requests, sampling, complete))
            while left:
                found = [complete.get()]
                with contextlib.suppress(queue.Empty):
                    while True:
                        found.append(complete.get_nowait())
                for request in found:
                    try:
                        request.rollouts, request.state = request.state.task.result(), None
                    except BaseExceptionGroup as errors:
                        raise first_of(errors) from None
                left -= len(found)
                yield found
        except GeneratorExit:
            raise
        except BaseException:  # Ctrl-C included
            tasks = [request.state.task for request in requests if request.state is not None]
            with contextlib.suppress(RuntimeError):  # the pool is closed, and its loop with it
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])
            raise

    async def _ask_all(
        self, requests: Sequence[Request], sampling: Sampling, complete: queue.SimpleQueue[Request]
    ) -> None:
        """Begin what was not begun; ``complete`` is told of every request that is, from now on or already."""
        batch = next(self._batches)
        for request in requests:
            if request.rollouts is not None:
                continue
            if request.state is None:
                task = asyncio.create_task(self._respond_all(batch, request, sampling))
                request.state = OpenRequest(request, task)
            request.state.tell(complete)

    async def _respond_all(self, batch: int, request: Request, sampling: Sampling) -> list[Rollout]:
        """All responses of a request, in as many HTTP requests as a server's slots ask for."""
        most = min(request.n, self._rollout.max_num_seqs)
        async with asyncio.TaskGroup() as group:  # one failure cancels the rest
            tasks = [
                group.create_task(
                    self._respond(batch, request.prompt, min(most, request.n - first), sampling, (request.seed, first))
                )
                for first in range(0, request.n, most)
            ]
        return [rollout for task in tasks for rollout in task.result()]

    async def _respond(
        self,
        batch: int,
        prompt: Sequence[int],
        n: int,
        sampling: Sampling,
        key: tuple[int, ...],
        written: Piece | None = None,
    ) -> list[Rollout]:
        """``n`` responses to one prompt. Each response that an update aborts is continued by a separate request."""
        so_far = written.tokens.tolist() if written else []
        context = [*prompt, *so_far]
        room = min(sampling.max_tokens - len(so_far), self._rollout.max_model_len - len(context))
        have = 0 if written is None or written.experts is None else len(written.experts)
        pieces = await self._ask(batch, context, n, sampling, request_seed(*key), room, have)
        if written:
            pieces = [written.then(piece) for piece in pieces]
        cut_off = [index for index, piece in enumerate(pieces) if piece.finish_reason == "abort"]
        if not cut_off:
            return [piece.rollout(prompt) for piece in pieces]
        self._requests["continued"] += len(cut_off)
        async with asyncio.TaskGroup() as group:
            rest = {
                index: group.create_task(
                    self._respond(batch, prompt, 1, sampling, (*key, index, len(pieces[index].tokens)), pieces[index])
                )
                for index in cut_off
            }
        return [
            rest[index].result()[0] if index in rest else piece.rollout(prompt) for index, piece in enumerate(pieces)
        ]

    async def _ask(
        self, batch: int, context: list[int], n: int, sampling: Sampling, seed: int, max_tokens: int, have: int
    ) -> list[Piece]:
        """One request, on up to three servers one after the other. ``have``: tokens whose experts are there already."""
        self._requests["requests"] += 1
        experts = self._experts if sampling.experts else None
        start = None if self._experts is None else have if sampling.experts else len(context)
        for attempt in range(ATTEMPTS):
            server = await self._server_for(batch, n)
            body = request_body(context, n, sampling, seed, max_tokens=max_tokens, eos=self._eos, experts_from=start)
            try:
                content = await self._generate_unless_failed(server, body)
                progress.beat(phase="rollout")
                pieces = parse_answer(content, self._labels, experts, len(context) - have)
                self._require_experts(pieces, sampling)
                return pieces
            except ServerError as error:
                if not isinstance(error, GivenUp):
                    self.fleet.fail(server, error)
                if attempt + 1 == ATTEMPTS:
                    raise ServerError(
                        f"a request with {len(context)} tokens of prompt, {context[:8]}..., failed on {ATTEMPTS} "
                        f"servers, the last time because of {error}"
                    ) from error
                self._requests["retries"] += 1
            finally:
                server.in_flight -= n
                self.fleet.notify()
        raise AssertionError("unreachable")

    def _require_experts(self, pieces: list[Piece], sampling: Sampling) -> None:
        whole = [piece for piece in pieces if piece.finish_reason != "abort"]
        if sampling.experts and self._rollout.routing_replay and any(piece.experts is None for piece in whole):
            raise ValueError(
                f"rollout.routing_replay=true, but a server returns no experts: start it with {FLAG}, or set "
                "rollout.routing_replay=null"
            )

    async def _server_for(self, batch: int, n: int) -> Server:
        """The least busy server, once it is this request's turn and one has room. The batch asked for first goes first.

        A server gets at most twice as many samples as it can decode at a time, so its queue is short but never empty.
        RuntimeError if no server serves and none returns in time.
        """
        most = 2 * self._rollout.max_num_seqs
        async with self._line.front(batch):
            deadline = time.monotonic() + self._rollout.revive_timeout_s
            while True:
                serving = [server for server in self.servers if server.usable]
                free = [s for s in serving if not s.in_flight or s.in_flight + n <= most]
                if free and not self._holding:
                    server = min(free, key=lambda s: (s.in_flight, s.requests))
                    server.in_flight += n
                    server.requests += 1
                    return server
                if serving or self._holding:
                    deadline = time.monotonic() + self._rollout.revive_timeout_s
                self._check_hope()
                if not await self.fleet.until_changed(deadline) and not serving and not self._holding:
                    raise ServerError(self._nobody())

    async def _generate_unless_failed(self, server: Server, body: dict[str, Any]) -> bytes:
        """The server's answer, or ServerError as soon as the server is found to have failed."""
        timeout_s = self._rollout.timeout_s
        async with self._connections:
            return await self._answer_unless_failed(server, body, timeout_s)

    async def _answer_unless_failed(self, server: Server, body: dict[str, Any], timeout_s: float) -> bytes:
        answer: asyncio.Future[Any] = asyncio.ensure_future(self.fleet.generate(server, body, timeout_s))
        failure = server.failure
        try:
            await asyncio.wait({answer, failure}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise GivenUp(failure.result())
            return bytes(answer.result())
        finally:
            answer.cancel()

    def _check_hope(self) -> None:
        if all(server.state == "gone" for server in self.servers):
            raise ServerError("every rollout server has failed and been given up; see the servers' logs")

    def _nobody(self) -> str:
        states = ", ".join(f"{server.url} {server.state}" for server in self.servers)
        return (
            f"no usable rollout server came back within {self._rollout.revive_timeout_s:.0f} s "
            f"(rollout.revive_timeout_s): {states}; see the servers' logs"
        )

    # ---- weight updates ---------------------------------------------------------------------------------------------

    @property
    def staging_root(self) -> Path | None:
        """See `RolloutEngine`: the directory of weight files."""
        return self._sync.root if isinstance(self._sync, DiskSync) else None

    def push(self, version: int, tensors: Iterable[tuple[str, Tensor]], ranks: Ranks | None = None) -> None:
        """See `RolloutEngine`. The servers continue to generate while the tensors are staged."""
        self._run(self._delivering.acquire())  # a server that is just coming back finishes first
        try:
            self.sync_seconds = {}
            cast = cast_floats(tensors, self._rollout.dtype)
            checksum = stage_weights(self._sync, version, cast, self.sync_seconds, ranks)
            self._run(self._update(version, f"{version}-{checksum[:16]}"))
            self.sync_seconds |= self._updater.seconds
            if self._rollout.colocated:
                self._sync.free()
        finally:
            self._loop.call_soon_threadsafe(self._delivering.release)

    async def _update(self, version: int, label: str) -> None:
        """Deliver to all live servers. WeightUpdateError if none accepts it; then nothing is served."""
        self._holding = True
        self._labels[label] = version  # responses in flight carry it from the moment a server has it
        try:
            if self._rollout.in_flight == "wait":
                while any(server.in_flight for server in self.servers):
                    await self.fleet.until_changed(time.monotonic() + 1.0)
            updated = await self._deliver_to_all(label)
        except BaseException:
            self._sync.discard()
            raise
        finally:
            self._holding = False
            self.fleet.notify()
        self.fleet.initial_label = None
        self.version, self._label = version, label
        for server in self.servers:
            if server in updated:
                self.fleet.serve(server)
            elif server.usable:  # came back with the first weights meanwhile
                server.state = "stale"

    async def _deliver_to_all(self, label: str) -> list[Server]:
        deadline = time.monotonic() + self._rollout.revive_timeout_s
        while True:
            ready = [server for server in self.servers if server.state in ("serving", "stale")]
            for server in ready:
                server.state = "stale"
            failed = await self._deliver(ready, label)
            updated = [server for server in ready if server not in failed]
            if updated:
                return updated
            if refusals := [error for error in failed.values() if not isinstance(error, NoAnswer)]:
                raise WeightUpdateError(f"weight update failed: {refusals[0]}") from refusals[0]
            if all(server.state == "gone" for server in self.servers):
                raise WeightUpdateError("every rollout server has failed and been given up; see the servers' logs")
            if not await self.fleet.until_changed(deadline):
                raise WeightUpdateError(self._nobody())

    async def _deliver(self, servers: Sequence[Server], label: str) -> dict[Server, Exception]:
        failed = await self._updater.deliver(servers, label, self._rollout.in_flight)
        for server, error in failed.items():
            if isinstance(error, NoAnswer):
                self.fleet.fail(server, error)
            else:
                self.fleet.refuse(server, error)
        return failed

    async def _offer(self, server: Server) -> None:
        """Send a returned server the version that the others serve, if it is still staged."""
        async with self._delivering:
            on_gpu = self._rollout.weight_sync == "nccl"  # its kernels must not mix with those of a training step
            if server.state == "stale" and self._sync.info and not on_gpu:
                if not await self._deliver([server], self._label):
                    self.fleet.serve(server)

    # ---- turns on a GPU (`recipes.rollout.colocated.Sleeper`) ------------------------------------------

    def sleep(self) -> None:
        """All servers give back the memory of weights and KV cache, whose contents are lost. No request may run.

        WeightUpdateError when one cannot, or is just being restarted and would take memory later.
        """
        self._run(self._put_to_sleep())

    def wake(self, tag: str) -> None:
        """All servers take the memory of "weights" or "kv_cache" again; `push` comes between the two."""
        self._run(self._on_all([server for server in self.servers if server.state != "gone"], f"/wake_up?tags={tag}"))

    async def _put_to_sleep(self) -> None:
        servers = [server for server in self.servers if server.state != "gone"]
        if down := [server.url for server in servers if server.state == "down"]:
            raise WeightUpdateError(f"{down[0]} is down and cannot be put to sleep: its memory is in an unknown state")
        for server in servers:
            server.updating = True  # so that no probe restarts a sleeping server while the learner has the memory
        await self._on_all(servers, "/sleep?level=2&mode=wait")
        for server in servers:
            server.state = "stale"

    async def _on_all(self, servers: Sequence[Server], path: str) -> None:
        calls = [self.fleet.post(server, path, None, self._rollout.update_timeout_s) for server in servers]
        for answer in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise WeightUpdateError(f"sleep or wake-up failed: {answer}") from answer

    # ---- inside -----------------------------------------------------------------------------------------------------

    @property
    def fleet(self) -> Fleet:
        assert self._fleet is not None
        return self._fleet

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseExceptionGroup as errors:
            raise first_of(errors) from None
        finally:
            future.cancel()  # after Ctrl-C here, the requests must not go on

    def close(self) -> None:
        """Stop own servers and wait until their processes are gone; remove staged weights. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._fleet is not None:
            self._fleet.stop()
        self._sync.close()

    async def _end(self) -> None:
        """End all tasks, and all threads that wait for them."""
        if self._fleet is not None:
            await self._fleet.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


def make_sync(rollout: RolloutConfig, model_dir: Path) -> WeightSync:
    """The transport that ``rollout.weight_sync`` names."""
    if rollout.weight_sync == "nccl" and not torch.cuda.is_available():
        raise ValueError("rollout.weight_sync=nccl: there is no GPU here; set rollout.weight_sync to disk or gloo")
    digest = "sha256" if rollout.weight_digest == "sha256" else None  # None: the transport's fast one
    if rollout.weight_sync == "ipc":
        return IpcSync(digest=digest, delta=not rollout.colocated)
    if rollout.weight_sync not in ("auto", "disk"):  # a job decides on auto (recipes.cluster.transport)
        return BroadcastSync(rollout.weight_sync, digest=digest)
    on_disk = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    parent = Path(rollout.sync_dir).absolute() if rollout.sync_dir else None
    need = 4 * on_disk  # bfloat16 sent as float32, and twice that to spare
    return DiskSync(parent, need, digest or "xxh3", delta=not rollout.colocated)  # sleeping servers forget all weights
