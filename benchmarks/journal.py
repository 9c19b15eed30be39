"""Cost of a step's rollouts on rank 0: one record encoded, written and synced, read back, cut into samples.

    python -m benchmarks.journal [--tokens 67108864] [--length 8192] [--json OUT]

Responses are tensors, as the rollout pool delivers them. Both CPU and wall seconds are printed: the difference is the
disk. The same step as the JSON lines of the first version is measured on 1/64 of the tokens, and scaled.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64 << 20)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--n", type=int, default=16, help="responses per prompt")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    from megatron_ext.rl.types import Problem, Rollout, Sample
    from recipes.loop import journal

    count = options.tokens // options.length
    ids = torch.randint(0, 150_000, (options.length,), dtype=torch.int32)
    logprobs, prompt = -torch.rand(options.length), ids[:200].clone()
    groups: list[journal.Group] = []
    for start in range(0, count, options.n):
        # Each tensor owns its memory, as in a real run
        members = [
            Sample(
                Rollout(
                    prompt, ids.clone(), logprobs.clone(), torch.tensor([5], dtype=torch.int32).expand(len(ids)), "stop"
                ),
                *(str(start), start, start + index),
            )
            for index in range(min(options.n, count - start))
        ]
        groups.append((Problem(str(start), "", "1"), members))
    seconds: dict[str, dict[str, float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        seconds[name] = {"wall_s": round(time.perf_counter() - wall, 3), "cpu_s": round(time.process_time() - cpu, 3)}
        return result

    record = {"kind": "rollouts", "step": 0, "groups": groups}
    with tempfile.TemporaryDirectory(dir=".") as directory:
        target = journal.Journal(Path(directory) / journal.FILE)
        payload = timed("encode", lambda: journal.encode(record))
        timed("write", lambda: target._write(payload))
        target.close()
        place = timed("index", lambda: journal.index(Path(directory) / journal.FILE)[0]["rollouts", 0])
        timed("read", lambda: journal.read(place))
    found = timed("parse", lambda: journal.Record(payload))
    timed("samples", lambda: found.samples(0))
    few = [(problem, members[:1]) for problem, members in groups[: max(1, len(groups) // 4)]]
    old = timed("json", lambda: _as_json(few))
    timed("json_parse", lambda: json.loads(old))
    share = options.tokens / (len(few) * options.length)
    report = {
        "date": str(date.today()),
        "cores": os.cpu_count(),
        "tokens": count * options.length,
        "responses": count,
        "bytes_per_token": round(len(payload) / (count * options.length), 3),
        "seconds": {name: value for name, value in seconds.items() if not name.startswith("json")},
        "json_scaled_cpu_s": {name: round(share * seconds[name]["cpu_s"], 1) for name in ("json", "json_parse")},
        "json_bytes_per_token": round(len(old) / (len(few) * options.length), 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _as_json(groups: Any) -> bytes:
    """The format of the first version, which every rank read."""
    rows = [
        {"ids": s.rollout.response_ids.tolist(), "logprobs": s.rollout.logprobs.tolist()}
        | {"versions": s.rollout.weight_versions.tolist()}
        for _, members in groups
        for s in members
    ]
    return json.dumps({"groups": rows}, separators=(",", ":")).encode()


if __name__ == "__main__":
    main()
