"""The servers of a pool: start, watch, remove failed ones and re-admit them.

Everything here runs on the pool's event loop. A failed server that the pool started is restarted a limited number of
times, with growing pauses. A server given by URL is probed until it answers. A returned server is "stale": it serves
only after it has loaded the pool's weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from configs.schema import RolloutConfig
from recipes.rollout.engine import Sampling
from recipes.rollout.vllm.client import (
    ALIVE,
    GENERATE,
    NoAnswer,
    Server,
    ServerError,
    new_session,
    request,
    request_body,
    request_bytes,
)
from recipes.rollout.vllm.server import Place, ServerProcess, stop_all

MAX_RESTARTS = 5  # in a row without serving in between
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before a restart, or between two questions to a lost server


class Fleet:
    """Servers with their processes and connections.

    Args:
        initial_label: label of servers started here, whose weights are those of the model directory; None once the pool
            has sent its own weights, which alone may then be served.
        offer: called with a returned server, to send it weights.
    """

    def __init__(
        self,
        rollout: RolloutConfig,
        place: Place,
        *,
        token: str,
        initial_label: str,
        offer: Callable[[Server], Awaitable[None]],
    ) -> None:
        self.counters = {"server_failures": 0, "revived": 0}
        self.initial_label: str | None = initial_label
        self.changed = asyncio.Event()  # set at every change of a server's state or load
        self._rollout, self._place, self._token = rollout, place, token
        self._offer = offer
        self._session: aiohttp.ClientSession | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self.servers = [Server(url.rstrip("/"), index) for index, url in enumerate(rollout.urls)]
        for index in range(0 if rollout.urls else rollout.num_servers):
            process = ServerProcess(index, rollout, place, token=token)
            self.servers.append(Server(process.url, index, process))

    async def start(self) -> None:
        """Returns when all serve or wait for weights. RuntimeError if one does not start."""
        self._session = new_session(self._token)
        try:
            async with asyncio.timeout(self._rollout.start_timeout_s):
                await asyncio.gather(*(self._come_up(server) for server in self.servers))
        except TimeoutError as error:
            late = [server for server in self.servers if server.state == "down"]
            tail = late[0].process.log_tail() if late and late[0].process else ""
            raise RuntimeError(
                f"{len(late)} rollout server(s) not ready after {self._rollout.start_timeout_s:.0f} s\n{tail}"
            ) from error
        self._watchers = [asyncio.create_task(self._watch(server)) for server in self.servers]

    async def close(self) -> None:
        """End all connections; `stop` afterwards, outside the loop, ends the processes."""
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def stop(self) -> None:
        """End own servers and wait until their processes are gone."""
        stop_all([server.process for server in self.servers if server.process])

    async def post(self, server: Server, path: str, body: Any, timeout_s: float) -> Any:
        assert self._session is not None
        return await request(self._session, "POST", server, path, body, timeout_s)

    async def generate(self, server: Server, body: dict[str, Any], timeout_s: float) -> bytes:
        """The answer to a generation request, not decoded.

        Sent again, once, when the connection ends before an answer: a server may close one that it keeps for us at any
        time, and a seeded generation may be made twice. A server that has died refuses the second connection.
        """
        assert self._session is not None
        try:
            return await request_bytes(self._session, "POST", server, GENERATE, body, timeout_s)
        except NoAnswer as error:
            if not isinstance(error.__cause__, aiohttp.ServerDisconnectedError | ConnectionResetError):
                raise
        return await request_bytes(self._session, "POST", server, GENERATE, body, timeout_s)

    async def get(self, server: Server, path: str, timeout_s: float = 5.0) -> Any:
        assert self._session is not None
        return await request(self._session, "GET", server, path, None, timeout_s)

    def notify(self) -> None:
        """Wake whoever waits for a server, or for room on one."""
        self.changed.set()
        self.changed = asyncio.Event()

    def fail(self, server: Server, reason: object) -> None:
        """Take a server out of use and abandon its requests. Reported and counted once."""
        if server.state not in ("down", "gone"):
            server.state = "down"
            self._give_up_requests(server, f"failed: {reason}")

    def refuse(self, server: Server, reason: object) -> None:
        """Mark a server that answers but did not accept an update: it serves nothing before it does."""
        server.state = "stale"
        self._give_up_requests(server, f"is not used before it takes over an update: {reason}")

    def _give_up_requests(self, server: Server, reason: str) -> None:
        self.counters["server_failures"] += 1
        say(server, reason)
        server.failure.set_result(f"{server.url} {reason}")
        server.failure = asyncio.get_running_loop().create_future()
        self.notify()

    def serve(self, server: Server) -> None:
        """The server holds the pool's weights."""
        if server.tries:
            self.counters["revived"] += 1
            say(server, "is back")
        server.state, server.tries = "serving", 0
        self.notify()

    # ---- coming up and being watched --------------------------------------------------------------------------------

    async def _come_up(self, server: Server) -> None:
        """Wait until a real token comes out: /health also answers when the engine behind it hangs."""
        process = server.process
        while True:
            if process and not process.running:
                raise RuntimeError(f"a rollout server ended while starting:\n{process.log_tail()}")
            try:
                await self.get(server, "/health")
                break
            except ServerError:
                await asyncio.sleep(0.2)
        if process:
            process.ready()
        await self._generate_something(server)
        server.state = "stale"
        if server.process and self.initial_label is not None:
            body = {"new_version": self.initial_label}
            await self.post(server, "/update_weight_version", body, self._rollout.probe_s)
            self.serve(server)
        self.notify()

    async def _generate_something(self, server: Server) -> None:
        body = request_body([0], 2, Sampling(max_tokens=2), 0, max_tokens=2, eos=())
        await self.post(server, GENERATE, body, self._rollout.start_timeout_s)

    async def _watch(self, server: Server) -> None:
        """Probe a server until it is closed; bring it back when it has failed."""
        pause = max(min(self._rollout.probe_s / 6, 5.0), 0.05)
        while server.state != "gone":
            if server.state == "down":
                await self._bring_back(server)
                continue
            await asyncio.sleep(pause)
            if server.updating or server.state == "down":
                continue
            try:
                if server.process and not server.process.running:
                    raise NoAnswer(f"its process ended:\n{server.process.log_tail(5)}")
                await self.get(server, ALIVE, self._rollout.probe_s)
            except (ServerError, ValueError) as error:
                if not server.updating:  # begun meanwhile: an engine that loads weights answers nothing else
                    self.fail(server, error)

    async def _bring_back(self, server: Server) -> None:
        """One attempt; the server is "stale" or better after it, or still "down", or "gone"."""
        if server.process and server.tries >= MAX_RESTARTS:
            server.state = "gone"
            say(server, f"given up after {server.tries} restarts")
            self.notify()
            return
        await asyncio.sleep(min(FIRST_PAUSE_S * 2**server.tries, LONGEST_PAUSE_S))
        server.tries += 1
        try:
            if server.process:
                await self._restart(server, server.process)
            async with asyncio.timeout(self._rollout.start_timeout_s):
                await self._come_up(server)
        except (ServerError, ValueError, RuntimeError, TimeoutError) as error:
            if server.process or server.tries == 1:
                say(server, f"is not back: {str(error) or 'no answer in time'}")
            server.state = "down"
            return
        if not server.usable:
            await self._offer(server)

    async def _restart(self, server: Server, old: ServerProcess) -> None:
        old.terminate()
        await asyncio.to_thread(old.wait)
        server.process = ServerProcess(server.index, self._rollout, self._place, token=self._token, append=True)
        server.url = server.process.url

    async def until_changed(self, deadline: float) -> bool:
        """Wait for the next `notify`; False when ``deadline`` (of `time.monotonic`) came first."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), max(deadline - time.monotonic(), 0.0))
            return True
        return False


def say(server: Server, text: str) -> None:
    print(f"rollout server {server.index} ({server.url}) {text}", file=sys.stderr, flush=True)
