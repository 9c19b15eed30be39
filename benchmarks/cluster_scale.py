"""Cost of one step on rank 0 at cluster scale: 128 servers and 64 ranks, simulated by two processes on one machine.

    python -m benchmarks.cluster_scale [--servers 128] [--ranks 64] [--prompts 1024] [--tokens 512] [--json OUT]

The real pool sends requests to 128 servers (one process on 128 ports that answers at once with what vLLM sends), the
real journal writes and reads the record, and a real gloo group of 64 ranks (threads) broadcasts it. CPU seconds are
rank 0's own, which do not depend on the machine's other load; the broadcast's are those of all ranks together, divided
by them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import tempfile
import threading
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any


def serve(pipe: Any, servers: int, tokens: int) -> None:
    """Run all stand-ins: the weight-update routes succeed, and each request gets a prepared answer."""
    from aiohttp import web

    label: dict[int, str] = {}
    held: dict[int, dict[str, Any]] = {}
    entry = {"token": "token_id:1234", "logprob": -0.123456789, "bytes": [116, 111], "top_logprobs": []}
    entries = json.dumps([entry | {"logprob": -((7 * k) % 1000 + 1) / 1024} for k in range(tokens)])
    ids = json.dumps([(31 * k) % 150_000 for k in range(tokens)])

    async def handle(request: web.Request) -> web.Response:
        port = request.transport.get_extra_info("sockname")[1]  # type: ignore[union-attr]
        body = await request.json() if request.can_read_body else {}
        if request.path == "/inference/v1/generate":
            spans = json.dumps([{"version": label.get(port, ""), "start": 0, "end": tokens}])
            choice = f'"logprobs":{{"content":{entries}}},"finish_reason":"length","token_ids":{ids},'
            choices = [
                f'{{"index":{k},{choice}"weight_versions":{spans}}}' for k in range(body["sampling_params"]["n"])
            ]
            text = f'{{"request_id":"0","choices":[{",".join(choices)}]}}'
            return web.Response(text=text, content_type="application/json")
        if request.path == "/update_weights":
            held[port] = {key: body["update_info"][key] for key in ("version", "checksum")}
        if request.path == "/finish_weight_update":
            label[port] = body["weight_version"]
        if request.path == "/collective_rpc":
            return web.json_response({"results": [held[port]]})
        return web.json_response({"success": True, "world_size": 1})

    async def main() -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        sites = [web.TCPSite(runner, "127.0.0.1", 0) for _ in range(servers)]
        urls = []
        for site in sites:
            await site.start()
            urls.append(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")  # type: ignore[union-attr]
        pipe.send(urls)
        await asyncio.Event().wait()

    asyncio.run(main())


def broadcast_s(ranks: int, size: int) -> float:
    """CPU seconds per rank of one broadcast of ``size`` bytes in a gloo group of ``ranks`` threads."""
    import torch
    import torch.distributed as dist

    store = dist.HashStore()
    groups: list[Any] = [None] * ranks

    def join(rank: int) -> None:
        groups[rank] = dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=120))

    def share(rank: int) -> None:
        groups[rank].broadcast(torch.zeros(size, dtype=torch.uint8), 0).wait()

    for work in (join, share):
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
        begin = time.process_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return (time.process_time() - begin) / ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512, help="of a response")
    parser.add_argument("--n", type=int, default=8, help="responses to a prompt")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    from configs.schema import RolloutConfig
    from megatron_ext.rl.types import Problem, Sample
    from recipes.loop import journal
    from recipes.rollout.engine import Sampling
    from recipes.rollout.vllm.pool import VLLMPool
    from recipes.rollout.vllm.server import Place

    os.environ["VLLM_API_KEY"] = "secret"
    pipe, its = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=serve, args=(its, options.servers, options.tokens), daemon=True
    )
    process.start()
    tokens = options.prompts * options.n * options.tokens
    spent: dict[str, float] = {}

    def measure(name: str, call: Any) -> Any:
        begin = time.process_time()
        result = call()
        spent[name] = time.process_time() - begin
        return result

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "config.json").write_text('{"eos_token_id": 2}')
        length = 256 + options.tokens
        rollout = RolloutConfig(
            urls=pipe.recv(), max_model_len=length, max_num_seqs=64, sync_dir=str(directory / "sync"), timeout_s=600.0
        )
        pool = measure("pool comes up", lambda: VLLMPool(rollout, Place(directory, directory)))
        measure("weights of 128 MiB to all servers", lambda: pool.push(0, {"w": torch.ones(1 << 25)}.items()))
        prompts = [[5 + k % 90 for k in range(128)] for _ in range(options.prompts)]
        sampling, seeds = Sampling(options.tokens), range(options.prompts)
        made = measure("generate", lambda: pool.generate(prompts, n=options.n, sampling=sampling, seeds=seeds))
        failures = pool.counters["server_failures"]
        pool.close()
        groups = [
            (Problem(f"p{g}", "", "7"), [Sample(r, f"p{g}", g, 0) for r in made[g * options.n : (g + 1) * options.n]])
            for g in range(options.prompts)
        ]
        book = journal.Journal(directory / journal.FILE)
        record = {"kind": "rollouts", "step": 0, "position": 0, "groups": groups}
        payload = measure("journal write", lambda: book.put(record))
        book.close()
    process.terminate()
    part = min(len(payload), 8 << 20)
    spent["broadcast, per rank"] = broadcast_s(options.ranks, part) * len(payload) / part
    report = {
        "date": str(date.today()),
        "cores": os.cpu_count(),
        "servers": options.servers,
        "ranks": options.ranks,
        "response_tokens": tokens,
        "server_failures": failures,
        "journal_bytes_per_token": round(len(payload) / tokens, 2),
        "cpu_s": {name: round(seconds, 2) for name, seconds in spent.items()},
        "cpu_us_per_token": {
            name: round(1e6 * spent[name] / tokens, 3) for name in ("generate", "journal write", "broadcast, per rank")
        },
    }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
