"""A stand-in for one vLLM server, and a pool of them with short time limits."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web

from configs.schema import RolloutConfig
from megatron_ext.sync.base import Clock
from megatron_ext.sync.broadcast import Rendezvous, broadcast, join_group
from megatron_ext.sync.buckets import Entry, layout, tensors_of
from megatron_ext.sync.receive import Update, read_shared
from recipes.rollout.vllm import fleet as vllm_fleet
from recipes.rollout.vllm.pool import VLLMPool
from recipes.rollout.vllm.server import Place

WEIGHTS = {"w": torch.arange(6.0)}
MIXTURE: dict[str, Any] = {  # config.json of a mixture of experts
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    **{"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4, "head_dim": 32},
    **{"intermediate_size": 96, "vocab_size": 8, "max_position_embeddings": 64, "hidden_act": "silu"},
    **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    **{"mlp_only_layers": [], "decoder_sparse_step": 1, "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
}


class StandIn:
    """Answers like one vLLM server. ``fault`` maps a path, or "*", to "hang", "500", "disconnect" or "ignore"."""

    def __init__(self, label: str = "default") -> None:
        self.fault: dict[str, str] = {}
        self.label = label
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.loaded: dict[str, Any] = {"version": None, "checksum": None}
        self.received: dict[str, torch.Tensor] = {}  # by broadcast or shared memory
        self.group: Any = None
        self.cache_reset = True
        self.busy = self.most_busy = 0
        self.tokens_s = 0.01  # for one response
        self.paused = ""
        self.experts: tuple[int, int] | None = None  # layers, experts per token: (position, 0, ...) for each one
        self.close_kept = False  # close a connection at its second generation, before the answer
        self.closed = 0
        self._used: set[asyncio.BaseTransport] = set()
        self._resumed, self._cut_off = asyncio.Event(), asyncio.Event()
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._ready.wait()

    def _serve(self) -> None:
        async def start() -> None:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", self._answer)
            runner = web.AppRunner(app, shutdown_timeout=0)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = site.name
            self._ready.set()

        self._loop.run_until_complete(start())
        self.url = self.url.rstrip("/")
        self._loop.run_forever()

    def stop(self) -> None:
        async def end() -> None:
            hanging = asyncio.all_tasks() - {asyncio.current_task()}
            for task in hanging:
                task.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _answer(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer secret"
        path = request.path
        body = await request.json() if request.can_read_body else {}
        if path not in ("/health", "/is_paused"):
            self.calls.append(path)
        if "poison" in self.fault and body.get("token_ids") == [77, 3, 4]:
            return web.Response(status=500, text="engine dead")
        match self.fault.get(path, self.fault.get("*")):
            case "hang":
                await asyncio.sleep(30)
            case "500":
                return web.Response(status=500, text="engine dead")
            case "disconnect":
                assert request.transport is not None
                request.transport.close()
        if path == "/pause":
            self.paused, self._resumed = request.query["mode"], asyncio.Event()
            self._cut_off.set()
        if path == "/resume":
            self.paused, self._cut_off = "", asyncio.Event()
            self._resumed.set()
        if path == "/get_world_size":
            return web.json_response({"world_size": 1})
        if path == "/update_weight_version":
            self.label = body["new_version"]
        if path == "/init_weight_transfer_engine":
            rendezvous = Rendezvous(**body["init_info"])
            self.group = await asyncio.to_thread(join_group, rendezvous, rendezvous.rank)
        if path == "/update_weights" and "buckets" in body["update_info"]:
            try:
                await asyncio.to_thread(self._receive, body["update_info"])
            except (OSError, ValueError) as error:
                return web.Response(status=500, text=str(error))
        if path == "/update_weights" and path not in self.fault:
            self.loaded = {key: body["update_info"][key] for key in ("version", "checksum")}
        if path == "/finish_weight_update":
            self.label = body["weight_version"]
        if path == "/collective_rpc":
            return web.json_response({"results": [self.loaded]})
        if path == "/reset_prefix_cache":
            return web.json_response({"success": self.cache_reset})
        if path == "/inference/v1/generate":
            if self.close_kept and request.transport is not None:
                if request.transport in self._used:
                    self.closed += 1
                    request.transport.close()
                self._used.add(request.transport)
            return await self._generate(body)
        return web.json_response({})

    def _receive(self, info: dict[str, Any]) -> None:
        if "socket" in info:
            found = read_shared(Update(**info), torch.device("cpu"), Clock({}))
            self.received = {name: tensor.clone() for name, tensor in found.items()}
            return
        for part in info["buckets"]:
            entries = [Entry(**entry) for entry in part]
            data = torch.empty(layout(entries)[1], dtype=torch.uint8)
            broadcast(self.group, data, timeout_s=5.0)
            self.received |= tensors_of(data, entries)

    async def _generate(self, body: dict[str, Any]) -> web.Response:
        """Two tokens: the prompt's first, and the number of tokens of context. An update may come between them."""
        self.bodies.append(body)
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        context, most = body["token_ids"], body["sampling_params"]["max_tokens"]
        tokens, labels = [context[0]], [self.label]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._cut_off.wait(), self.tokens_s)
        reason = "abort" if self.paused == "abort" else "length"
        if self.paused == "keep":
            await self._resumed.wait()
        if reason == "length" and most > 1:
            tokens.append(len(context))
            labels.append(self.label)
        self.busy -= 1
        choice = {
            "token_ids": tokens,
            "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -0.25}][: len(tokens)]},
            "finish_reason": reason,
            "weight_versions": [{"version": label, "start": i, "end": i + 1} for i, label in enumerate(labels)],
        }
        if self.experts is not None and tokens:
            first = body["sampling_params"].get("routed_experts_prompt_start", 0)
            places = np.arange(first, len(context) + len(tokens) - 1, dtype=np.uint8)
            routed = np.zeros((len(places), *self.experts), dtype=np.uint8)
            routed[:, :, 0] = places[:, None]
            np.save(buffer := io.BytesIO(), routed)
            choice["routed_experts"] = base64.b64encode(buffer.getvalue()).decode()
        return web.json_response({"choices": [choice] * body["sampling_params"]["n"]})


def make_pool(
    servers: list[StandIn], model_dir: Path, monkeypatch: pytest.MonkeyPatch, *, max_num_seqs: int = 8, **changed: Any
) -> VLLMPool:
    """A pool with short time limits, whose servers hold version 0."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setattr(vllm_fleet, "FIRST_PAUSE_S", 0.05)
    limits: dict[str, Any] = {"timeout_s": 20.0, "update_timeout_s": 0.8, "start_timeout_s": 5.0, "probe_s": 0.6}
    limits |= {"revive_timeout_s": 1.0, "sync_dir": str(model_dir / "sync")} | changed
    urls = [server.url for server in servers]
    rollout = RolloutConfig(urls=urls, max_model_len=32, max_num_seqs=max_num_seqs, **limits)
    pool = VLLMPool(rollout, Place(model_dir, model_dir))
    pool.push(0, WEIGHTS.items())
    return pool


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def prompts(count: int) -> list[list[int]]:
    return [[10 + index, 3, 4] for index in range(count)]
