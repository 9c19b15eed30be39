"""A pool of vLLM servers behind `RolloutEngine`: dispatch, retry, weight versions, and the control plane of updates.

The caller's side is synchronous; HTTP runs on an event loop in a thread of its own. One request carries one prompt and
all its samples; token ids go in and out, so nothing is tokenised twice.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import secrets
import threading
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import numpy as np
import torch
from torch import Tensor

from megatron_ext.rl.types import Rollout
from megatron_ext.sync.base import WeightUpdateError, push_weights
from megatron_ext.sync.disk import DiskSync
from recipes.rollout import Activity, Sampling, check_request, stop_tokens, url_token
from recipes.vllm_server import ServerOptions, ServerProcess, stop_all

T = TypeVar("T")
GENERATE = "/inference/v1/generate"


class ServerError(RuntimeError):
    """A server did not answer, or answered with an error of its own."""


@dataclass(frozen=True)
class PoolOptions:
    """Time limits in seconds, and where weights are staged."""

    request_timeout_s: float = 600.0  # one generation request, waiting in the server's queue included
    update_timeout_s: float = 120.0  # one phase of a weight update on one server
    start_timeout_s: float = 300.0
    sync_dir: Path | None = None  # must be seen by the servers; None: a private directory in /dev/shm


@dataclass
class Server:
    """State of one server as the pool sees it. Only the event loop's thread changes it."""

    url: str
    process: ServerProcess | None = None  # None: given by URL, not ours to stop
    usable: bool = False  # serves the pool's weight version
    in_flight: int = 0
    requests: int = 0


class VLLMPool:
    """`RolloutEngine` over HTTP, and `megatron_ext.sync.base.Servers` for the weight transport.

    A server that fails a request is not used again before a full weight update; its request is sent once more, to
    another server. An update that does not succeed on every live server raises WeightUpdateError and leaves none
    usable; the next good update brings them back, without those that died.
    """

    def __init__(
        self, server: ServerOptions, options: PoolOptions, *, num_servers: int, urls: Sequence[str], log_dir: Path
    ) -> None:
        if num_servers < 1 and not urls:
            raise ValueError(f"rollout.num_servers={num_servers}: start at least one server, or give rollout.urls")
        self.version = 0
        self.counters = {"requests": 0, "retries": 0, "server_failures": 0}
        self._server_options, self._options = server, options
        self._eos = stop_tokens(server.model_dir)
        self._activity = Activity()
        token = url_token() if urls else secrets.token_urlsafe(32)
        self._headers = {"Authorization": f"Bearer {token}"}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-http", daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession | None = None
        self.servers = [Server(url.rstrip("/")) for url in urls]
        on_disk = sum(path.stat().st_size for path in server.model_dir.glob("*.safetensors"))
        self._sync = DiskSync(self, options.sync_dir, 4 * on_disk)  # bfloat16 sent as float32, and twice that to spare
        self._closed = False
        atexit.register(self.close)
        try:
            for index in range(0 if urls else num_servers):
                process = ServerProcess(index, server, token=token, log_dir=log_dir)
                self.servers.append(Server(process.url, process))
            self._run(self._start())
        except BaseException:
            self.close()
            raise

    # ---- generation -------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Sequence[int]], *, n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See `RolloutEngine`. RuntimeError when no usable server is left, or a request failed on two of them."""
        check_request(prompts, n, seeds, self._server_options.max_model_len)
        if sampling.temperature == 0 and n > 1:
            raise ValueError(f"n={n} with temperature=0: greedy responses are all the same, use n=1")
        with self._activity.generating():
            return self._run(self._generate(prompts, n, sampling, seeds))

    async def _generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        per_request = min(n, self._server_options.max_num_seqs)
        # Twice what the servers can decode at a time: their queues never run dry, and never grow long either.
        slots = -(-2 * self._server_options.max_num_seqs * len(self.servers) // per_request)
        limit = asyncio.Semaphore(slots)

        async def one(prompt: Sequence[int], seed: int, first: int) -> list[Rollout]:
            async with limit:
                body = self._body(prompt, min(per_request, n - first), sampling, request_seed(seed, first))
                return await self._ask_with_retry(prompt, body)

        async with asyncio.TaskGroup() as group:  # one failure cancels the rest
            tasks = [
                group.create_task(one(prompt, seed, first))
                for prompt, seed in zip(prompts, seeds, strict=True)
                for first in range(0, n, per_request)
            ]
        return [rollout for task in tasks for rollout in task.result()]

    def _body(self, prompt: Sequence[int], n: int, sampling: Sampling, seed: int) -> dict[str, Any]:
        params = {
            "n": n,
            "seed": seed,
            "max_tokens": min(sampling.max_tokens, self._server_options.max_model_len - len(prompt)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "logprobs": 0,  # of the sampled token only
            # End-of-sequence ids are sent as stop tokens: the server would read them from other files than we do.
            "ignore_eos": True,
            "stop_token_ids": sorted(self._eos | set(sampling.stop_token_ids)),
            "detokenize": False,
        }
        return {"token_ids": list(prompt), "sampling_params": params}

    async def _ask_with_retry(self, prompt: Sequence[int], body: dict[str, Any]) -> list[Rollout]:
        self.counters["requests"] += 1
        try:
            return await self._ask(prompt, body)
        except ServerError:
            if not any(server.usable for server in self.servers):
                raise
            self.counters["retries"] += 1
            return await self._ask(prompt, body)

    async def _ask(self, prompt: Sequence[int], body: dict[str, Any]) -> list[Rollout]:
        """One request to the least busy usable server; a failing server is taken out of use."""
        usable = [server for server in self.servers if server.usable]
        if not usable:
            raise ServerError("no usable rollout server: all failed or miss a weight update; see the servers' logs")
        server = min(usable, key=lambda s: (s.in_flight, s.requests))
        server.in_flight += 1
        server.requests += 1
        try:
            answer = await self._post(server, GENERATE, body, timeout_s=self._options.request_timeout_s)
            return [parse_choice(prompt, choice) for choice in answer["choices"]]
        except ServerError:
            if server.usable:
                self.counters["server_failures"] += 1
            server.usable = False
            raise
        finally:
            server.in_flight -= 1

    # ---- weight updates (`megatron_ext.sync.base.Servers`) ----------------------------------------------------------

    def push(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """See `RolloutEngine`. Refused (RuntimeError) while `generate` runs."""
        with self._activity.updating():
            push_weights(self._sync, version, cast_floats(tensors, self._server_options.dtype))
            self.version = version

    def start_update(self) -> None:
        self._run(self._on_all("/pause?mode=wait", find_dead=True))

    def receive(self, info: dict[str, Any]) -> None:
        self._run(self._on_all("/start_weight_update", reopen=True))
        self._run(self._on_all("/update_weights", {"update_info": info}))

    def finish_update(self, version: int, checksum: str) -> None:
        self._run(self._finish_update(version, checksum))

    def fail_update(self) -> None:
        for server in self.servers:
            server.usable = False

    async def _on_all(
        self, path: str, body: dict[str, Any] | None = None, *, find_dead: bool = False, reopen: bool = False
    ) -> list[Any]:
        """POST to every live server at the same time and wait for all. WeightUpdateError if one fails."""
        live = [server for server in self.servers if await self._alive(server)]
        dead = [server.url for server in self.servers if server not in live and server.usable]
        if find_dead:
            for server in self.servers:
                server.usable = False  # until the whole update is confirmed
        if dead and find_dead:
            raise WeightUpdateError(f"rollout server {dead[0]} died; push again to go on with the {len(live)} others")
        if not live:
            raise WeightUpdateError("no rollout server is alive; see the servers' logs")
        calls = [self._post(server, path, body, timeout_s=self._options.update_timeout_s) for server in live]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            # "Already active" after an update that broke off: harmless, nothing is loaded before /update_weights.
            if isinstance(answer, BaseException) and not (reopen and "already active" in str(answer)):
                raise WeightUpdateError(f"weight update failed: {answer}") from answer
        return answers

    async def _finish_update(self, version: int, checksum: str) -> None:
        await self._on_all("/finish_weight_update", {"weight_version": str(version)})
        for answer in await self._on_all("/collective_rpc", {"method": "loaded_weights"}):
            for worker in answer["results"]:
                if worker != {"version": version, "checksum": checksum}:
                    raise WeightUpdateError(f"a rollout worker holds {worker}, not version {version} {checksum[:12]}")
        for answer in await self._on_all("/reset_prefix_cache"):
            if not answer["success"]:
                raise WeightUpdateError("the prefix cache was not reset: requests of another client are running")
        await self._on_all("/resume")
        for server in self.servers:
            server.usable = await self._alive(server)

    async def _alive(self, server: Server) -> bool:
        if server.process is not None:
            return server.process.running
        try:
            await self._get(server, "/health")
        except ServerError:
            return False
        return True

    # ---- start, stop, HTTP ------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        # No connection is used twice: a server closes idle ones after seconds, and a request that is just being sent on
        # such a connection fails as if the server had died. A new one costs 0.2 ms.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)
        try:
            async with asyncio.timeout(self._options.start_timeout_s):
                await asyncio.gather(*(self._start_one(server) for server in self.servers))
        except TimeoutError as error:
            late = [server for server in self.servers if not server.usable]
            tail = late[0].process.log_tail() if late and late[0].process else ""
            raise RuntimeError(
                f"{len(late)} rollout server(s) not ready after {self._options.start_timeout_s:.0f} s\n{tail}"
            ) from error

    async def _start_one(self, server: Server) -> None:
        """Wait until a real token comes out: /health also answers when the engine behind it hangs."""
        while True:
            if server.process and not server.process.running:
                raise RuntimeError(f"a rollout server ended while starting:\n{server.process.log_tail()}")
            try:
                await self._get(server, "/health")
                break
            except ServerError:
                await asyncio.sleep(0.2)
        if server.process:
            server.process.ready()
        label = (await self._get(server, "/weight_info"))["weight_version"]
        if label == "default":
            await self._post(server, "/update_weight_version", {"new_version": "0"}, timeout_s=30.0)
        probe = self._body([0], 2, Sampling(max_tokens=2), seed=0)
        await self._post(server, GENERATE, probe, timeout_s=self._options.start_timeout_s)
        server.usable = label in ("default", "0")  # another run's weights: not before the first update

    async def _post(self, server: Server, path: str, body: dict[str, Any] | None, *, timeout_s: float) -> Any:
        return await self._request("POST", server, path, body, timeout_s)

    async def _get(self, server: Server, path: str) -> Any:
        return await self._request("GET", server, path, None, 5.0)

    async def _request(self, method: str, server: Server, path: str, body: Any, timeout_s: float) -> Any:
        """Decoded JSON answer. ServerError for no answer, a late one, or an error of the server; ValueError for 4xx."""
        assert self._session is not None
        try:
            limit = aiohttp.ClientTimeout(total=timeout_s)
            async with self._session.request(method, server.url + path, json=body, timeout=limit) as response:
                content = await response.read()
        except TimeoutError as error:
            raise ServerError(f"{server.url}{path}: no answer within {timeout_s:.0f} s") from error
        except aiohttp.ClientError as error:
            raise ServerError(f"{server.url}{path}: {type(error).__name__}: {error}") from error
        if response.status >= 500 or response.status in (401, 403, 404):
            raise ServerError(f"{server.url}{path}: HTTP {response.status}: {content[:500].decode(errors='replace')}")
        if response.status != 200:
            raise ValueError(f"{server.url}{path} refused the request: {content[:500].decode(errors='replace')}")
        return json.loads(content) if content else None

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseExceptionGroup as errors:  # of a TaskGroup: the first is the cause, the others follow from it
            raise errors.exceptions[0] from None
        finally:
            future.cancel()  # after Ctrl-C here, the requests must not go on

    def close(self) -> None:
        """Stop own servers and wait until their processes are gone; remove staged weights. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._session is not None:
            self._run(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        stop_all([server.process for server in self.servers if server.process])
        self._sync.close()


def parse_choice(prompt: Sequence[int], choice: dict[str, Any]) -> Rollout:
    """One choice of vLLM's tokens-in-tokens-out answer. ServerError when it is not a whole, labelled response."""
    tokens: list[int] = choice["token_ids"]
    logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    versions: list[int] = []
    for span in choice["weight_versions"] or []:
        versions += [int(span["version"])] * (span["end"] - span["start"])
    if choice["finish_reason"] not in ("stop", "length") or not len(tokens) == len(logprobs) == len(versions):
        raise ServerError(
            f"incomplete response: finish_reason {choice['finish_reason']!r}, {len(tokens)} tokens, "
            f"{len(logprobs)} logprobs, {len(versions)} weight versions"
        )
    if min(logprobs, default=0.0) <= -9999.0:
        raise ServerError("the server reports no log-probability for a sampled token (NaN in its logits?)")
    return Rollout(list(prompt), tokens, logprobs, versions, choice["finish_reason"])


def request_seed(seed: int, first: int) -> int:
    """Seed of the request that starts at sample ``first``, in [0, 2^62).

    vLLM gives sample i of a request ``seed + i``: neighbouring seeds of the caller would make samples of neighbouring
    prompts share their random numbers, so they are hashed apart.
    """
    words = np.random.SeedSequence([seed % 2**64, first]).generate_state(1, np.uint64)
    return int(words[0]) >> 2


def cast_floats(tensors: Iterable[tuple[str, Tensor]], dtype: str) -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in the servers' dtype, so that no bytes are sent to be rounded there; "auto": as is."""
    target = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
    for name, tensor in tensors:
        yield name, tensor.to(target) if target is not None and tensor.is_floating_point() else tensor
