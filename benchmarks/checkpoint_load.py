"""Cost of the NaN check when a checkpoint is loaded: `python -m benchmarks.checkpoint_load [--json OUT]`.

One process, bfloat16 weights with Adam's float32 state, 14 bytes a parameter. Loads with and without
`megatron_ext.learner.finite` alternate; CPU seconds of this process, medians, and their ratio. Files are in the page
cache, so nothing but the processor is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

from benchmarks.checkpoint_memory import SIZES
from benchmarks.learner_memory import make_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    from configs.schema import Config, ModelConfig, OptimConfig
    from megatron_ext.learner import checkpoint
    from megatron_ext.learner.learner import Learner
    from megatron_ext.learner.model import distributed

    torch.set_num_threads(1)
    spent: dict[str, list[float]] = {"with": [], "without": []}
    looked = checkpoint.check_finite
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_model(place / "model", **SIZES)
        config = Config(
            model=ModelConfig(path=str(place / "model"), dtype="bfloat16", transformer_impl="local"),
            optim=OptimConfig(distributed=True),
        )
        with distributed(config.parallel, 0):
            learner = Learner(config, place / "model", total_updates=9)
            directory = checkpoint.save(learner, place / "checkpoints", 1, {})
            size = sum(path.stat().st_size for path in directory.rglob("*.distcp"))
            for turn in range(2 * options.turns + 2):
                name = ("without", "with")[turn % 2]
                checkpoint.check_finite = looked if name == "with" else lambda *_: None
                begin = time.process_time()
                checkpoint.load(learner, directory)
                if turn > 1:  # the first two warm up
                    spent[name].append(time.process_time() - begin)
    median = {name: statistics.median(seconds) for name, seconds in spent.items()}
    report = {
        "date": str(date.today()),
        "mib": round(size / 2**20, 1),
        "cpu_s": {name: round(seconds, 3) for name, seconds in median.items()},
        "ratio": round(median["with"] / median["without"], 3),
        "check_us_per_mib": round(1e6 * (median["with"] - median["without"]) / (size / 2**20), 1),
    }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
