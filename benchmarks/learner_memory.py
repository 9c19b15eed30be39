"""Memory of one optimizer step compared with the estimate of `recipes.plan`, part by part.

    python -m benchmarks.learner_memory [--settings base recompute ...] [--out FILE.jsonl]

The model is random, of a size whose activations dominate; every micro-batch is full of response tokens, as the plan
assumes. Only tensors are measured: the CPU allocator's growth between the start of an update and its peak (torch's
profiler), or on a GPU `torch.cuda.max_memory_allocated`; and the storages of weights, gradients and optimizer state.
The rank that needs most counts, as in the plan. Code, libraries and the allocator's own waste come on top.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.vocab_statistics import peak_bytes

SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8}
SIZES |= {"vocab_size": 16384}
TOKENS = 1024  # of a micro-batch
LIVE = "activations and loss"  # in memory during backward only
SAMPLE = (2, 127)  # prompt and response tokens; the model reads 128
# name: overrides of the base, processes
SETTINGS: dict[str, tuple[str, int]] = {
    "base": ("", 1),
    "twice the tokens": (f"train.micro_batch_tokens={2 * TOKENS}", 1),
    "logits of 16 tokens": ("train.loss_chunk_tokens=16", 1),
    "whole logits": ("train.loss_chunk_tokens=100000", 1),
    "recompute": ("model.recompute=true", 1),
    "bfloat16": ("model.dtype=bfloat16 model.transformer_impl=local", 1),
    "sgd": ("optim.optimizer=sgd", 1),
    "tp 2": ("parallel.tp=2", 2),
    "tp 2, sp": ("parallel.tp=2 parallel.sp=true", 2),
    "pp 2": ("parallel.pp=2", 2),
    "cp 2": ("parallel.cp=2", 2),
    "dp 2, distributed optimizer": ("parallel.nproc=2 optim.distributed=true", 2),
    "experts": ("", 1),
    "experts, ep 2": ("parallel.ep=2 parallel.nproc=2", 2),
}
BASE = (
    f"train.micro_batch_tokens={TOKENS} data.max_prompt_tokens=2 rollout.max_tokens=127 rollout.max_model_len=130 "
    "train.steps=1 rollout.n=1 advantage.name=reinforce_pp eval.k=[1] eval.n=1"
)


def make_model(directory: Path, **sizes: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False)
    config.update(sizes)
    LlamaForCausalLM(config).save_pretrained(directory)


def make_experts(directory: Path) -> None:
    """Qwen3-MoE's shape: a token is routed to two of eight experts; norms of queries and keys."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **SIZES,
        **{"num_key_value_heads": 4, "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 512, "norm_topk_prob": True, "max_position_embeddings": 512},
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(directory)


def measure(words: list[str]) -> dict[str, float]:
    """Bytes of this rank by part. Runs inside the process group's processes."""
    from megatron_ext.learner.learner import Learner
    from megatron_ext.learner.model import distributed
    from megatron_ext.learner.offload import model_tensors, optimizer_tensors
    from megatron_ext.rl.aggregation import sequence_weights
    from megatron_ext.rl.losses import build_loss
    from recipes.checks.settings import load_checked
    from recipes.planning.memory import data_parallel
    from recipes.train import make_batch

    config = load_checked(words)
    torch.set_num_threads(config.train.threads)
    with distributed(config.parallel, 0):
        learner = Learner(config, Path(config.model.path), total_updates=9)
        # One micro-batch per data-parallel rank, but as many in flight as there are pipeline stages.
        each = config.train.micro_batch_tokens // (sum(SAMPLE) - 1) * data_parallel(config) * config.parallel.pp
        samples = [_sample(number) for number in range(each)]
        batch, groups_B, include_B = make_batch(config, samples)
        lengths = batch.offsets.diff()
        weights_B = sequence_weights("token_mean", lengths, groups_B, max_tokens=SAMPLE[1], include_B=include_B)

        def update() -> None:
            learner.update(batch, range(each), weights_B, build_loss("ce_gppo"))

        update()  # allocates the optimizer's state
        beyond = peak_bytes(update)
        buffers = [b.grad_data for chunk in learner.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
        return {
            "weights": float(_bytes(model_tensors(learner.chunks))),
            "gradients": float(_bytes(buffers)),
            "optimizer": float(_bytes(optimizer_tensors(learner.optimizer, learner.chunks))),
            LIVE: float(beyond),
        }


def _sample(number: int) -> Any:
    from megatron_ext.rl.types import Rollout, Sample

    generator = torch.Generator().manual_seed(number)
    prompt, response = (torch.randint(1000, (n,), generator=generator).tolist() for n in SAMPLE)
    n = SAMPLE[1]
    return Sample(Rollout(prompt, response, [-1.0] * n, [0] * n, "length"), str(number), number, number, advantage=1.0)


def _bytes(tensors: Any) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def planned(words: list[str]) -> dict[str, float]:
    """The plan's estimate of the same parts."""
    import conversion
    from recipes.checks.settings import load_checked
    from recipes.planning.memory import learner_memory

    config = load_checked(words)
    memory = learner_memory(config, conversion.read_config(config.model.path))
    return {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        LIVE: memory.activations + memory.momentary,
    }


def words_of(name: str, directory: Path) -> list[str]:
    """The configuration of a setting."""
    model = directory / ("experts" if name.startswith("experts") else "model")
    overrides, processes = SETTINGS[name]
    sizes = [f"rollout.prompts_per_step={64 * processes}", f"train.mini_batch_prompts={64 * processes}"]
    return [f"model.path={model}", *BASE.split(), *overrides.split(), *sizes]


def measure_all(directory: Path, names: list[str]) -> None:
    """Measure the settings one after the other in this process of their group; write the results."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1:
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    for name in names:
        measured = measure(words_of(name, directory))
        (directory / f"{name}.{rank}.json").write_text(json.dumps(measured))


def run(processes: int, names: list[str], directory: Path) -> None:
    """Measure the settings that need ``processes`` processes, in new processes."""
    command = ["-m", "benchmarks.learner_memory", "--inside", str(directory), "--settings", *names]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], check=True, env=environment, stdout=subprocess.DEVNULL)


def compare(name: str, directory: Path) -> dict[str, Any]:
    """Planned and measured MiB by part, and measured / planned."""
    ranks = [json.loads((directory / f"{name}.{rank}.json").read_text()) for rank in range(SETTINGS[name][1])]
    fullest: dict[str, float] = max(ranks, key=lambda parts: sum(parts.values()))
    plan = planned(words_of(name, directory))

    def mib(parts: dict[str, float]) -> dict[str, float]:
        return {part: round(size / 2**20, 1) for part, size in {**parts, "total": sum(parts.values())}.items()}

    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "setting": name,
        "overrides": SETTINGS[name][0],
        "measured_mib": mib(fullest),
        "planned_mib": mib(plan),
        "measured / planned": round(sum(fullest.values()) / sum(plan.values()), 3),
        f"{LIVE}, measured / planned": round(fullest[LIVE] / plan[LIVE], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # used by the benchmark itself
    args = parser.parse_args()
    if args.inside is not None:
        measure_all(args.inside, args.settings)
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make_model(directory / "model")
        make_experts(directory / "experts")
        for processes in sorted({SETTINGS[name][1] for name in args.settings}):
            names = [name for name in args.settings if SETTINGS[name][1] == processes]
            run(processes, names, directory)
            for name in names:
                row = json.dumps(compare(name, directory))
                print(row, flush=True)
                if args.out is not None:
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(row + "\n")


if __name__ == "__main__":
    main()
