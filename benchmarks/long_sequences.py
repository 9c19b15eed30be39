"""One sequence of 32,768 tokens through our attention: time and memory, whole and cut over four ranks, on a CPU.

    python -m benchmarks.long_sequences [--tokens 32768] [--cp 4]

Forward and backward of one head of one layer in float32, one thread, each case in a process of its own. Under context
parallelism a rank has 1 / cp of the queries and, gathered, all keys; the time is that of one rank (all have the same
work), communication left out. ``mask_at_once`` is what the blocks of queries avoid. Memory is what the process needed
beyond its inputs. Results of ours: benchmarks/results/long_sequences_*.jsonl.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from datetime import date
from typing import Any

CASES = ("whole", "cut", "mask_at_once")


def measure(case: str, tokens: int, cp: int) -> dict[str, Any]:
    import torch
    from megatron.core.transformer import TransformerConfig

    from megatron_ext.learner import attention
    from megatron_ext.rl.packing import zigzag

    torch.set_num_threads(1)
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=1, attention_dropout=0.0)
    if case == "mask_at_once":
        attention.MASK_ELEMENTS = tokens * tokens
    module = attention.PackedAttention(config, 1, None, "self")
    position = None if case == "whole" else zigzag(torch.tensor([0, tokens], dtype=torch.int32), 0, cp)[None]
    queries = tokens if position is None else tokens // cp
    q, k, v = (torch.randn(1, 1, length, 64, requires_grad=True) for length in (queries, tokens, tokens))
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    module._attend(q, k, v, position).sum().backward()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"case": case, "tokens": tokens, "cp": 1 if position is None else cp, "queries": queries} | {
        "cpu_s": round(time.process_time() - begin, 2),
        "memory_mib": memory // 1024,
    }


def _child(pipe: Any, *args: Any) -> None:
    import megatron_ext.learner  # noqa: F401 - prepares Megatron for the CPU

    pipe.send(measure(*args))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--cp", type=int, default=4)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for case in CASES:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(send, case, options.tokens, options.cp))
        process.start()
        print(json.dumps({"date": str(date.today()), **receive.recv()}), flush=True)
        process.join()


if __name__ == "__main__":
    main()
