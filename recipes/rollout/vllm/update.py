"""The requests by which servers load the staged weights, for each server independently as far as possible.

pause -> start -> (join the learner's group) -> receive -> finish -> compare version and checksum -> reset the prefix
cache -> resume. A server that fails in any phase is left out; the others continue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from megatron_ext.sync.base import Clock, WeightSync
from recipes.rollout.vllm.client import NoAnswer, Server, ServerError

Post = Callable[[Server, str, Any, float], Awaitable[Any]]
Get = Callable[[Server, str], Awaitable[Any]]
GROUP_TIMEOUT_S = 60.0  # for joining a group, and for one bucket of a broadcast
GRACE_S = 10.0  # for answers, after the learner's side of a transfer has failed


class Updater:
    """Delivers what ``sync`` has staged. ``timeout_s``: for the transfer; ``answer_s``: for each phase but that."""

    def __init__(self, sync: WeightSync, post: Post, get: Get, *, timeout_s: float, answer_s: float) -> None:
        self._sync, self._post, self._get, self._timeout_s, self._answer_s = sync, post, get, timeout_s, answer_s
        self._members: list[str] = []  # addresses of the servers in the sync's group
        # Of the last delivery: "pause", "transfer", "confirm"; within "transfer" a worker's "receive", "check", "load".
        self.seconds: dict[str, float] = {}

    async def deliver(self, servers: Sequence[Server], label: str, mode: str) -> dict[Server, Exception]:
        """Returns the servers that did not accept the version, with the reason.

        Args:
            servers: that answer; they may have requests in flight.
            label: version label of responses sampled with the new weights.
            mode: "wait" | "keep" | "abort", for the requests in flight.
        """
        failed: dict[Server, Exception] = {}
        self.seconds = {}
        clock = Clock(self.seconds)
        for server in servers:
            server.updating = True
        try:
            left = await _each(servers, failed, lambda server: self._prepare(server, mode))
            clock.lap("pause")
            left = await self._transfer(left, failed)
            clock.lap("transfer")
            await _each(left, failed, lambda server: self._confirm(server, label))
            clock.lap("confirm")
        finally:
            for server in servers:
                server.updating = False
        return failed

    async def _prepare(self, server: Server, mode: str) -> None:
        # With clear_cache, kept requests give up their keys and values: after the update vLLM (0.32) reads prompt and
        # response so far again, with the new weights.
        await self._post(server, f"/pause?mode={mode}&clear_cache=true", None, self._answer_s)
        await self._start(server)

    async def _start(self, server: Server) -> None:
        try:
            await self._post(server, "/start_weight_update", None, self._answer_s)
        except ServerError as error:
            # After an update that broke off: harmless, nothing is loaded before /update_weights.
            if "already active" not in str(error):
                raise

    async def _transfer(self, servers: list[Server], failed: dict[Server, Exception]) -> list[Server]:
        """Transfer to all. A broadcast that fails is repeated without the servers that did not answer."""
        left = servers
        while left:
            silent: dict[Server, Exception] = {}
            problem = await self._join(left, silent) or await self._receive(left, failed, silent)
            left = [server for server in left if server not in failed]
            if problem is None:
                return left
            self._members = []
            if not silent:
                failed |= {server: ServerError(f"{server.url}: {problem}") for server in left}
            failed |= silent
            left = [server for server in left if server not in failed]
            left = await _each(left, failed, self._start)
        return []

    async def _join(self, servers: list[Server], silent: dict[Server, Exception]) -> str | None:
        """Connect learner and servers for a broadcast, unless they are; what went wrong, or None."""
        urls = [server.url for server in servers]
        if urls == self._members:
            return None
        sizes = await asyncio.gather(*(self._workers(server) for server in servers), return_exceptions=True)
        for server, size in zip(servers, sizes, strict=True):
            if isinstance(size, BaseException):
                silent[server] = ServerError(str(size))
        if silent:
            return "a server did not say how many workers it has"
        timeout_s = min(GROUP_TIMEOUT_S, self._timeout_s)
        bodies = self._sync.connect(urls, [size for size in sizes if isinstance(size, int)], timeout_s)
        if bodies:
            calls = [
                self._post(server, "/init_weight_transfer_engine", {"init_info": body}, self._timeout_s)
                for server, body in zip(servers, bodies, strict=True)
            ]
            problem = await self._together(servers, calls, self._sync.join, {}, silent)
            if problem:
                return problem
        self._members = urls
        return None

    async def _workers(self, server: Server) -> int:
        return int((await self._get(server, "/get_world_size"))["world_size"])

    async def _receive(
        self, servers: list[Server], failed: dict[Server, Exception], silent: dict[Server, Exception]
    ) -> str | None:
        body = {"update_info": self._sync.info}
        calls = [self._post(server, "/update_weights", body, self._timeout_s) for server in servers]
        return await self._together(servers, calls, self._sync.feed, failed, silent)

    async def _together(
        self,
        servers: list[Server],
        calls: Sequence[Awaitable[Any]],
        mine: Callable[[], None],
        failed: dict[Server, Exception],
        silent: dict[Server, Exception],
    ) -> str | None:
        """The servers' part and the learner's at the same time; returns the error of the learner's part, or None."""
        tasks = [asyncio.ensure_future(call) for call in calls]
        (own,) = await asyncio.gather(asyncio.to_thread(mine), return_exceptions=True)
        if own is not None:  # the others notice too; who does not is the one to leave out
            _, late = await asyncio.wait(tasks, timeout=GRACE_S)
            for task in late:
                task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for server, answer in zip(servers, answers, strict=True):
            if isinstance(answer, NoAnswer):
                silent[server] = answer
            elif isinstance(answer, asyncio.CancelledError):
                silent[server] = NoAnswer(f"{server.url}: silent in a weight transfer that broke off: {own}")
            elif isinstance(answer, ServerError | ValueError) and not isinstance(own, OSError):
                failed[server] = answer
            elif isinstance(answer, BaseException) and not isinstance(answer, ServerError | ValueError):
                raise answer
        if own is None:
            failed |= silent
            return None
        if isinstance(own, OSError):
            return str(own)
        raise own

    async def _confirm(self, server: Server, label: str) -> None:
        """Check that every worker reports this version with this checksum."""
        assert self._sync.info is not None
        announced = {key: self._sync.info[key] for key in ("version", "checksum")}
        await self._post(server, "/finish_weight_update", {"weight_version": label}, self._answer_s)
        answer = await self._post(server, "/collective_rpc", {"method": "loaded_weights"}, self._answer_s)
        for worker in answer["results"]:
            held = {key: worker.get(key) for key in announced}
            if held != announced:
                raise ServerError(f"{server.url}: a worker holds {held}, not the announced {announced}")
            for name, value in worker.get("seconds", {}).items():  # of the slowest worker
                self.seconds[name] = max(value, self.seconds.get(name, 0.0))
        # Refused while any request holds keys and values, which would be those of the old weights.
        answer = await self._post(server, "/reset_prefix_cache", None, self._answer_s)
        if not answer["success"]:
            raise ServerError(f"{server.url}: the prefix cache was not reset: requests hold on to what is in it")
        await self._post(server, "/resume", None, self._answer_s)


async def _each(
    servers: Sequence[Server], failed: dict[Server, Exception], call: Callable[[Server], Awaitable[None]]
) -> list[Server]:
    """Call for all servers at the same time; the ones for which it succeeded."""
    answers = await asyncio.gather(*(call(server) for server in servers), return_exceptions=True)
    for server, answer in zip(servers, answers, strict=True):
        if isinstance(answer, ServerError | ValueError):
            failed[server] = answer
        elif answer is not None:
            raise answer
    return [server for server in servers if server not in failed]
