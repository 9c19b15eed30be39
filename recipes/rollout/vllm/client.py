"""One vLLM server over HTTP: its state in the pool, requests, and their encoding and decoding."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import heapq
import itertools
import resource
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
import numpy as np
import torch

from megatron_ext.rl.types import Rollout
from recipes.rollout.engine import Sampling
from recipes.rollout.routing import Experts
from recipes.rollout.vllm.server import ServerProcess

GENERATE = "/inference/v1/generate"
KEEP_IDLE_S = 2.0  # vLLM closes a connection that was idle for 5 s ($VLLM_HTTP_TIMEOUT_KEEP_ALIVE)
ALIVE = "/is_paused"  # answered by the engine itself: /health also answers when the engine behind it hangs


FILES_PAUSE_S = 0.1  # before the next attempt when this process has too many files open
RESERVED_FILES = 256  # for everything except generation requests: logs, journal, probes, checkpoints


def most_connections() -> int:
    """Maximum number of open requests. First raises this process's limit of open files as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # a hard limit above what the kernel allows
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return 1 << 20 if soft == resource.RLIM_INFINITY else max(soft - RESERVED_FILES, soft // 2)


class ServerError(RuntimeError):
    """A server answered with an error, or with an unusable answer."""


class NoAnswer(ServerError):
    """A server did not answer, or not in time."""


class GivenUp(NoAnswer):
    """The pool did not wait for the answer, because the server had been taken out of use."""


class Line:
    """A priority queue with one holder at a time: the lowest number comes next, then the oldest."""

    def __init__(self) -> None:
        self._occupied = False
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap
        self._arrivals = itertools.count()

    @asynccontextmanager
    async def front(self, number: int) -> AsyncIterator[None]:
        """Held while at the front."""
        if self._occupied:
            turn = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (number, next(self._arrivals), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._next()  # it had just become ours
                raise
        self._occupied = True
        try:
            yield
        finally:
            self._next()

    def _next(self) -> None:
        self._occupied = False
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self._occupied = True
                turn.set_result(None)
                return


@dataclass(eq=False)
class Server:
    """One server. Only the event loop's thread changes it.

    States: "serving" the pool's version; "stale" (answers, waits for weights); "down" (failed, to be revived);
    "gone" (given up).
    """

    url: str
    index: int = 0
    process: ServerProcess | None = None  # None: given by URL, not ours to start or stop
    state: str = "down"
    in_flight: int = 0  # samples
    requests: int = 0
    updating: bool = False  # within a weight update, where no probe is answered in time
    tries: int = 0  # to bring it back, since it last served
    failure: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def usable(self) -> bool:
        return self.state == "serving"


def new_session(token: str) -> aiohttp.ClientSession:
    """Connections are kept and used again, but none that a server may be closing: those that were idle for long."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_IDLE_S)
    return aiohttp.ClientSession(connector=connector, headers={"Authorization": f"Bearer {token}"})


async def request(
    session: aiohttp.ClientSession, method: str, server: Server, path: str, body: Any, timeout_s: float
) -> Any:
    """Decoded JSON answer. ServerError for an error of the server, NoAnswer for none in time, ValueError for 4xx."""
    content = await request_bytes(session, method, server, path, body, timeout_s)
    return msgspec.json.decode(content) if content else None


async def request_bytes(
    session: aiohttp.ClientSession, method: str, server: Server, path: str, body: Any, timeout_s: float
) -> bytes:
    """As `request`, before decoding.

    When this process may open no further file the server is not to blame: the request is sent once it may.
    """
    limit, deadline = aiohttp.ClientTimeout(total=timeout_s), time.monotonic() + timeout_s
    data = None if body is None else msgspec.json.encode(body)
    headers = {"Content-Type": "application/json"} if data else None
    while True:
        try:
            async with session.request(
                method, server.url + path, data=data, headers=headers, timeout=limit
            ) as response:
                content = await response.read()
                break
        except TimeoutError as error:
            raise NoAnswer(f"{server.url}{path}: no answer within {timeout_s:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) and time.monotonic() < deadline:
                await asyncio.sleep(FILES_PAUSE_S)
                continue
            raise NoAnswer(f"{server.url}{path}: {type(error).__name__}: {error}") from error
    if response.status >= 500 or response.status in (401, 403, 404):
        raise ServerError(f"{server.url}{path}: HTTP {response.status}: {content[:500].decode(errors='replace')}")
    if response.status != 200:
        raise ValueError(f"{server.url}{path} refused the request: {content[:500].decode(errors='replace')}")
    return content


def request_body(
    prompt: Sequence[int],
    n: int,
    sampling: Sampling,
    seed: int,
    *,
    max_tokens: int,
    eos: Collection[int],
    experts_from: int | None = None,
) -> dict[str, Any]:
    """Body of a tokens-in-tokens-out request. ``experts_from``: the first token whose experts are returned."""
    params = {
        "n": n,
        "seed": seed,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "logprobs": 0,  # of the sampled token only
        # End-of-sequence ids are sent as stop tokens: the server would read them from other files than we do.
        "ignore_eos": True,
        "stop_token_ids": sorted({*eos, *sampling.stop_token_ids}),
        "detokenize": False,
    }
    if experts_from is not None:
        params["routed_experts_prompt_start"] = experts_from
    return {"token_ids": list(prompt), "sampling_params": params}


class LogprobEntry(msgspec.Struct):
    logprob: float


class LogprobList(msgspec.Struct):
    content: list[LogprobEntry]


class VersionSpan(msgspec.Struct):
    version: str
    start: int
    end: int


class Choice(msgspec.Struct):
    """One choice of vLLM's answer; other fields are skipped."""

    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: LogprobList | None = None
    weight_versions: list[VersionSpan] | None = None
    routed_experts: str | None = None


class Answer(msgspec.Struct):
    choices: list[Choice]


_ANSWER = msgspec.json.Decoder(Answer)


@dataclass
class Piece:
    """One choice of an answer: a whole response, or the beginning of one that an update aborted.

    ``tokens`` int32, ``logprobs`` float32, which they were computed in, ``versions`` int32; ``experts`` of the tokens
    read (`Rollout.experts`), of a continuation those that were read after the beginning was written.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish_reason: str  # "stop" | "length" | "abort"
    experts: np.ndarray | None = None

    def then(self, rest: Piece) -> Piece:
        known = [part for part in (self.experts, rest.experts) if part is not None]
        return Piece(
            np.concatenate([self.tokens, rest.tokens]),
            np.concatenate([self.logprobs, rest.logprobs]),
            np.concatenate([self.versions, rest.versions]),
            rest.finish_reason,
            np.concatenate(known) if rest.experts is not None else None,  # `rest` has all where the beginning has none
        )

    def rollout(self, prompt: Sequence[int]) -> Rollout:
        tokens, logprobs, versions = map(torch.from_numpy, (self.tokens, self.logprobs, self.versions))
        experts = None if self.experts is None else torch.from_numpy(self.experts)
        return Rollout(list(prompt), tokens, logprobs, versions, self.finish_reason, experts)


def parse_answer(
    content: bytes, labels: Mapping[str, int], experts: Experts | None = None, unread: int = 0
) -> list[Piece]:
    """The choices of a generation. ServerError for anything but a whole answer; see `parse_choice`."""
    try:
        answer = _ANSWER.decode(content)
    except msgspec.MsgspecError as error:
        raise ServerError(f"an answer that is not a generation: {error}") from error
    return [parse_choice(choice, labels, experts, unread) for choice in answer.choices]


def parse_choice(choice: Choice, labels: Mapping[str, int], experts: Experts | None = None, unread: int = 0) -> Piece:
    """One choice of vLLM's answer. ``labels``: the version that each label of ours stands for. ``experts``: the shape
    of the routing, where that is wanted, and ``unread`` the tokens of the prompt whose experts were asked for.

    ServerError if it is incomplete, or was sampled with other weights (a server that another process restarted has
    another label).
    """
    tokens = np.array(choice.token_ids, dtype=np.int32)
    entries = choice.logprobs.content if choice.logprobs else []
    logprobs = np.array([entry.logprob for entry in entries], dtype=np.float32)
    spans = choice.weight_versions or []
    for span in spans:
        if span.version not in labels:
            raise ServerError(f"the response was written by weights labelled {span.version!r}, which are not ours")
    if len(spans) == 1:
        versions = np.full(max(spans[0].end - spans[0].start, 0), labels[spans[0].version], dtype=np.int32)
    else:
        numbers = np.array([labels[span.version] for span in spans], dtype=np.int32)
        versions = np.repeat(numbers, [max(span.end - span.start, 0) for span in spans])
    reason = choice.finish_reason
    if reason not in ("stop", "length", "abort") or not len(tokens) == len(logprobs) == len(versions):
        raise ServerError(
            f"incomplete response: finish_reason {reason!r}, {len(tokens)} tokens, "
            f"{len(logprobs)} logprobs, {len(versions)} weight versions"
        )
    if len(logprobs) and logprobs.min() <= -9999.0:
        raise ServerError("the server reports no log-probability for a sampled token (NaN in its logits?)")
    routed = None
    if experts is not None and choice.routed_experts is not None:
        try:
            routed = experts.decode(choice.routed_experts, max(unread + len(tokens) - 1, 0))
        except ValueError as error:
            if reason != "abort":  # a request that is cut off may lack some; its continuation is asked for all
                raise ServerError(f"an answer with unusable experts: {error}") from error
    return Piece(tokens, logprobs, versions, reason, routed)
