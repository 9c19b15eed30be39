"""Tokens per second of the rollout pool with one server and with several, one core each, interleaved in one run.

    python -m benchmarks.rollout_pool --model cache/SmolLM2-135M-Instruct --servers 2 [--json OUT]

Both pools run at the same time and alternate, so that other load on the machine affects both; a pool that waits uses
no core. Time is that of `generate`, retries and token decoding included. Responses have ``--tokens`` at most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from configs.schema import RolloutConfig
    from recipes.rollout.engine import Sampling
    from recipes.rollout.make import make_engine

    prompts = [[3 + (7 * index + k) % 20 for k in range(16)] for index in range(options.prompts)]
    seconds: dict[int, list[float]] = {1: [], options.servers: []}
    tokens = 0
    with tempfile.TemporaryDirectory() as logs:
        pools = {
            count: make_engine(
                RolloutConfig(engine="vllm", num_servers=count, max_model_len=16 + options.tokens, max_num_seqs=128),
                options.model,
                Path(logs) / str(count),
            )
            for count in seconds
        }
        try:
            for turn in range(options.turns + 1):
                for count, pool in pools.items():
                    begin = time.perf_counter()
                    rollouts = pool.generate(
                        prompts, n=options.n, sampling=Sampling(options.tokens), seeds=range(options.prompts)
                    )
                    if turn:  # the first one warms up
                        seconds[count].append(time.perf_counter() - begin)
                    tokens = sum(len(r.response_ids) for r in rollouts)
        finally:
            for pool in pools.values():
                pool.close()
    rows = [
        {"servers": count, "tokens": tokens, "median_s": round(statistics.median(values), 3)}
        | {"tokens_per_s": round(tokens / statistics.median(values)), "seconds": [round(s, 3) for s in values]}
        for count, values in seconds.items()
    ]
    report = {"date": str(date.today()), "cores": os.cpu_count(), "model": options.model.name, "rows": rows}
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
