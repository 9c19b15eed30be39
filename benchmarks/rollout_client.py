"""CPU seconds of the rollout client per token, against stand-in servers that answer at once in processes of their own.

    python -m benchmarks.rollout_client [--tokens 9 256 4096] [--seconds 5] [--json OUT]

The stand-ins send what vLLM 0.32 sends, log-probability entries in full. The report has the share of a core that
this process, the event loop's thread included, needs at 10,000 tokens/s, and its maximum throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any


def serve(pipe: Any, tokens: int) -> None:
    """Run one stand-in: the weight-update routes succeed, and each request gets a prepared answer."""
    from aiohttp import web

    label, held, made = "", {"version": None, "checksum": None}, {}

    def answer(n: int) -> bytes:
        if (n, label) not in made:
            entry = {"token": "token_id:1234", "logprob": -0.123456789, "bytes": [116, 111], "top_logprobs": []}
            entries = [entry | {"logprob": -((7 * k) % 1000 + 1) / 1024} for k in range(tokens)]
            choice = {
                "index": 0,
                "logprobs": {"content": entries},
                "finish_reason": "length",
                "token_ids": [(31 * k) % 150_000 for k in range(tokens)],
                "weight_versions": [{"version": label, "start": 0, "end": tokens}],
            }
            body = {"request_id": "0" * 32, "choices": [choice | {"index": k} for k in range(n)]}
            made[n, label] = json.dumps(body).encode()
        return made[n, label]

    async def handle(request: web.Request) -> web.Response:
        nonlocal label, held
        path = request.path
        if path == "/inference/v1/generate":
            n = (await request.json())["sampling_params"]["n"]
            return web.Response(body=answer(n), content_type="application/json")
        body = await request.json() if request.can_read_body else {}
        if path == "/update_weights":
            held = {key: body["update_info"][key] for key in held}
        if path == "/finish_weight_update":
            label = body["weight_version"]
        if path == "/collective_rpc":
            return web.json_response({"results": [held]})
        return web.json_response({"success": True, "world_size": 1})

    async def main() -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        pipe.send(site.name.rstrip("/"))
        await asyncio.Event().wait()

    asyncio.run(main())


def make_pool(urls: list[str], directory: Path, length: int) -> Any:
    from configs.schema import RolloutConfig
    from recipes.rollout.vllm.pool import VLLMPool
    from recipes.rollout.vllm.server import Place

    rollout = RolloutConfig(urls=urls, max_model_len=length, max_num_seqs=128, sync_dir=str(directory / "sync"))
    return VLLMPool(rollout, Place(directory, directory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[9, 256, 4096], help="of a response")
    parser.add_argument("--n", type=int, default=8, help="responses of a request")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    from recipes.rollout.engine import Sampling

    os.environ["VLLM_API_KEY"] = "secret"
    context = multiprocessing.get_context("fork")
    rows = []
    for tokens in options.tokens:
        pipes, processes = [], []
        for _ in range(options.servers):
            mine, its = context.Pipe()
            processes.append(context.Process(target=serve, args=(its, tokens), daemon=True))
            processes[-1].start()
            pipes.append(mine)
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text('{"eos_token_id": 2}')
            pool = make_pool([pipe.recv() for pipe in pipes], Path(directory), 256 + tokens)
            try:
                pool.push(0, {"w": torch.ones(4)}.items())
                prompts = [[5 + k % 90 for k in range(128)] for _ in range(max(8, min(256, 65536 // tokens)))]
                done, cpu, wall = 0, 0.0, 0.0
                for turn in range(1000):
                    begin, busy = time.perf_counter(), time.process_time()
                    rollouts = pool.generate(prompts, n=options.n, sampling=Sampling(tokens), seeds=range(len(prompts)))
                    if turn:  # the first one warms up
                        done += sum(len(r.response_ids) for r in rollouts)
                        cpu += time.process_time() - busy
                        wall += time.perf_counter() - begin
                    if wall > options.seconds:
                        break
            finally:
                pool.close()
        for process in processes:
            process.terminate()
        rows.append(
            {"tokens_per_response": tokens, "n": options.n, "cpu_us_per_token": round(1e6 * cpu / done, 3)}
            | {"core_share_at_10k_tokens_per_s": round(1e4 * cpu / done, 4)}
            | {"tokens_per_s_at_most": round(done / cpu), "tokens_per_s_seen": round(done / wall)}
        )
    report = {"date": str(date.today()), "cores": os.cpu_count(), "servers": options.servers, "rows": rows}
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
