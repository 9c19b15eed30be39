"""The quick start over several seeds: `python -m benchmarks.quickstart [--seeds 0 1 2] [--out DIR] [key=value ...]`.

Each seed has its own warm start. Finished runs are only read. Prints one JSON line per seed: accuracy
on held-out problems before and after (95 % interval), entropy, seconds per step, tokens/s, memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def summary(run_dir: Path) -> dict[str, Any]:
    """Medians over steps where a number is per step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    def median(key: str) -> float:
        return round(statistics.median(row[key] for row in rows if key in row), 3)

    first, last = rows[0], rows[-1]
    result: dict[str, Any] = {"steps": len(rows)}
    for key in ("avg@8", "pass@8"):
        result[f"{key} before"] = round(first[f"val-before/chain/{key}"], 3)
        name = f"val-core/chain/{key}"
        result[f"{key} after"] = [round(last[n], 3) for n in (name, f"{name}/low", f"{name}/high")]
    result["entropy"] = [round(row["actor/entropy"], 3) for row in (first, last)]
    result |= {key: median(f"timing_s/{key}") for key in ("step", "wait", "statistics", "update", "sync")}
    result |= {key: median(f"perf/{key}") for key in ("throughput", "rollout_tokens_per_s", "learner_tokens_per_s")}
    result["learner_gib"] = round(max(row.get("perf/peak_memory_gib", 0.0) for row in rows), 2)
    result["abs_dp_max_over_steps"] = max(row["rollout_agreement/abs_dp_mean"] for row in rows)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_seeds"))
    args, overrides = parser.parse_known_args()
    for seed in args.seeds:
        run_dir = args.out / f"seed{seed}"
        seeds = [f"seed={seed}", f"model.warm_start.seed={seed}", f"run.dir={run_dir}"]
        command = [sys.executable, "-m", "recipes.train", "recipe=quickstart", *seeds, *overrides]
        if not (run_dir / "hf").is_dir():  # exported at the end
            subprocess.run(command, check=True, stdout=sys.stderr)
        print(json.dumps({"seed": seed, **summary(run_dir)}), flush=True)


if __name__ == "__main__":
    main()
