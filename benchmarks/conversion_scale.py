"""Cost of converting 70B, 235B and 671B models: plans at full size, and times from a measured rate.

    python -m benchmarks.conversion_scale [--rates benchmarks/results/conversion_0.5b_2cores.json] [--disk GB/S]

Measured here, at full size and in a process of its own for each model: the plan of an import (names, pieces, units,
index), its processor seconds and memory, which every process needs. Not measured: moving the bytes. That is computed
from the processor seconds per GiB that `benchmarks.conversion` measured, and from the bandwidth of the file system, an
assumption: bytes are read once and written once, at `--disk` each, for every node; the slower of processor and file
system counts, as both go on at the same time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
_MOE = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.1-70B": {
        **{"architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672},
        **{"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
        **{"max_position_embeddings": 131072, "rope_theta": 500000.0},
    },
    "Qwen3-235B-A22B": {
        **{"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 4096, "intermediate_size": 12288},
        **{"num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "vocab_size": 151936},
        **{"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536},
        **{"max_position_embeddings": 40960, "norm_topk_prob": True, **_MOE},
    },
    "DeepSeek-V3 671B": {
        **{"architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "intermediate_size": 18432},
        **{"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280},
        **{"q_lora_rank": 1536, "max_position_embeddings": 163840, **_MOE},
    },
}
SETUPS = ((1, 2), (1, 8), (4, 8))  # processes on a node each, and threads of each


def plan(model: str) -> dict[str, float]:
    """Plan an import, without the weights."""
    import torch

    import conversion
    from benchmarks.conversion import status_mib
    from conversion.hf_files import Located
    from conversion.megatron_writer import Plan

    class Reader:
        def __init__(self) -> None:
            self.tensors = {n: Located(ROOT, 0, s, torch.bfloat16) for n, s in conversion.hf_shapes(hf).items()}

    hf = conversion.parse_config(MODELS[model])
    before, started = status_mib("VmRSS"), time.process_time()
    made = Plan(hf, Reader(), None)  # type: ignore[arg-type]
    seconds = time.process_time() - started
    return {
        "bytes": made.total_bytes,
        "units": len(made.units),
        "largest unit MiB": max(unit.size for unit in made.units) / 2**20,
        "pieces": len(made.pieces),
        "plan seconds": seconds,
        "plan MiB": status_mib("VmHWM") - before,
    }


def rates(path: Path) -> dict[str, tuple[float, float]]:
    """Processor seconds per GiB and peak MiB of one thread, by direction."""
    content = json.loads(path.read_text(encoding="utf-8"))
    found = {}
    for direction in ("import", "export"):
        runs = content["runs"][f"{direction} (1 thread)"]
        cpu = statistics.median(run["cpu_seconds"] for run in runs) / (content["bytes"] / 2**30)
        found[direction] = cpu, max(run["peak_mib"] for run in runs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=Path, default=ROOT / "results" / "conversion_0.5b_2cores.json")
    parser.add_argument("--disk", type=float, default=2.0, help="GB/s that a node reads and writes (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plan", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plan:
        print(json.dumps(plan(args.plan)))
        return
    measured = rates(args.rates)
    print(f"{args.disk:g} GB/s per node; CPU s per GiB: " + ", ".join(f"{k} {v[0]:.2f}" for k, v in measured.items()))
    columns = "".join(f"{f'{n} x {t} threads':>16}" for n, t in SETUPS)
    print(f"{'':28}{'GiB':>7}{'units':>7}{'plan s':>8}{'plan MiB':>10}{columns}{'MiB, 8 threads':>16}")
    results: dict[str, Any] = {"disk GB/s": args.disk, "models": {}}
    for model in MODELS:
        command = [sys.executable, "-m", "benchmarks.conversion_scale", "--plan", model]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        results["models"][model] = found
        gib = found["bytes"] / 2**30
        for direction, (cpu, peak) in measured.items():
            minutes = [
                (max(cpu * gib / (nodes * threads), found["bytes"] / 1e9 / args.disk / nodes) + found["plan seconds"])
                / 60
                for nodes, threads in SETUPS
            ]
            found[f"{direction} minutes"] = dict(zip(map(str, SETUPS), minutes, strict=True))
            found[f"{direction} MiB, 8 threads"] = memory = found["plan MiB"] + 8 * peak
            times = "".join(f"{value:>12.1f} min" for value in minutes)
            head = f"{model + ' ' + direction:28}{gib:>7.0f}{found['units']:>7}{found['plan seconds']:>8.1f}"
            print(f"{head}{found['plan MiB']:>10.0f}{times}{memory:>16.0f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
