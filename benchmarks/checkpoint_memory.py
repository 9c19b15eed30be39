"""Memory that saving and loading a checkpoint take on one rank, compared with Megatron's own way of writing the files.

    python -m benchmarks.checkpoint_memory [--ranks 2 4 8] [--out FILE.json]

Data-parallel ranks with the distributed optimizer in bfloat16: 18 bytes a parameter in all, of which 12 (master weights
and moments) are divided among the ranks. The figure is the allocator's peak above its level at the start (torch's
profiler on a CPU, `torch.cuda.max_memory_allocated` on a GPU), in bytes a parameter, on the rank that needs the
most. ``megatron`` is Megatron-Core's ``fully_reshardable`` state, gathered on every rank.

Without gathering, ``save`` and ``load`` hold one piece at a time (the largest weight of a rank, or 256 MiB of optimizer
state), whatever the size of the model and the number of ranks: compare them with ``largest weight``. The last lines
give the other figures for a model of ``--params`` parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.learner_memory import make_model
from benchmarks.vocab_statistics import peak_bytes

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 256}
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 8192}


def measure(model_dir: Path, place: Path) -> dict[str, float]:
    """Bytes per parameter on this rank, by operation. Runs inside one of torchrun's processes."""
    from configs.schema import Config, ModelConfig, OptimConfig
    from megatron_ext.learner import checkpoint
    from megatron_ext.learner.learner import Learner
    from megatron_ext.learner.model import distributed

    config = Config(
        model=ModelConfig(path=str(model_dir), dtype="bfloat16", transformer_impl="local"),
        optim=OptimConfig(distributed=True),
    )
    config.parallel.nproc = int(os.environ["WORLD_SIZE"])
    with distributed(config.parallel, 0):
        learner = Learner(config, model_dir, total_updates=9)
        parameters = sum(p.numel() for p in learner.chunks[0].parameters())
        checkpoint.save(learner, place / "first", 1, {})  # allocates Adam's state
        background = checkpoint.Saver(place / "background", background=True)
        bytes_ = {
            "save": peak_bytes(lambda: checkpoint.save(learner, place / "ours", 1, {})),
            "load": peak_bytes(lambda: checkpoint.load(learner, place / "ours" / "step_000001")),
            "save in the background": peak_bytes(lambda: background.save(learner, 1, {})),
        }
        background.wait()
        bytes_["staged"] = background.staged_bytes
        use = checkpoint.use_pieces
        checkpoint.use_pieces = lambda optimizer: None
        for part in learner.optimizer.chained_optimizers:
            _forget_pieces(part)
        bytes_["save, megatron"] = peak_bytes(lambda: checkpoint.save(learner, place / "theirs", 1, {}))
        bytes_["load, megatron"] = peak_bytes(lambda: checkpoint.load(learner, place / "theirs" / "step_000001"))
        checkpoint.use_pieces = use
        row = torch.tensor([float(value) for value in bytes_.values()], device=learner.device)
        torch.distributed.all_reduce(row, op=torch.distributed.ReduceOp.MAX)
    largest = max(p.numel() for p in learner.chunks[0].parameters())
    about = {"parameters": parameters, "largest weight, of all parameters": largest / parameters}
    return about | dict(zip(bytes_, (row / parameters).tolist(), strict=True))


def _forget_pieces(part: Any) -> None:
    """Restore Megatron's own methods, and add the step count that they expect among the tensors of torch's Adam."""
    for name in ("sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable"):
        vars(part).pop(name, None)
    set_states: Callable[..., None] = type(part)._set_main_param_and_optimizer_states

    def keeping_step(parameter: Any, tensors: dict[str, Any]) -> None:
        there = part._get_main_param_and_optimizer_states(parameter)
        set_states(part, parameter, {**({"step": there["step"]} if "step" in there else {}), **tensors})

    part._set_main_param_and_optimizer_states = keeping_step


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_memory", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--params", type=float, default=7.6e9)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the program out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.inside:
        found = measure(args.inside / "model", args.inside / f"ckpt{os.environ['WORLD_SIZE']}")
        if os.environ["RANK"] == "0":
            (args.inside / "result.json").write_text(json.dumps(found))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as place:
        make_model(Path(place) / "model", **(TINY if args.tiny else SIZES))
        for ranks in args.ranks:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            inside = [*command, "-m", "benchmarks.checkpoint_memory", "--inside", place]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(inside, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            row = {"ranks": ranks, **json.loads((Path(place) / "result.json").read_text())}
            rows.append(row)
            print(json.dumps(row), flush=True)
    for row in rows:
        gib = {key: row[key] * args.params / 2**30 for key in row if key.endswith("megatron") or key == "staged"}
        print(
            f"{args.params:.3g} parameters, dp {row['ranks']}: " + ", ".join(f"{k} {v:.1f} GiB" for k, v in gib.items())
        )
    if args.out is not None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        facts = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "device": device,
            "unit": "bytes/parameter",
        }
        args.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
