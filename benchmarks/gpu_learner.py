"""Learner speed on one GPU: `python -m benchmarks.gpu_learner [--shape 7b] [--layers 4] [--fp8 none blockwise]`.

Random weights of a Qwen2.5 model's shape, with fewer layers where optimizer state would not fit one GPU; statistics
pass and one CE-GPPO optimizer step over packed sequences. Writes
benchmarks/results/gpu_learner_<card>_<date>.json: tokens/s, TFLOP/s and its share of the card's dense bfloat16 peak
(MFU, also for FP8, so that figures compare), and peak memory. FLOPs are counted as in `megatron_ext.flops`.
`--trace FILE.json.gz` records one optimizer step with torch's profiler (open it in Perfetto) and prints the kernels
that took longest. `--tiny` tests the program, also on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from configs.schema import Config, ModelConfig, OptimConfig, TrainConfig
from megatron_ext.flops import ForwardFlops, peak_tflops
from recipes.checks import fp8

QWEN_7B = {
    **{"architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
    **{"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False},
}
QWEN_1_5B = QWEN_7B | {
    **{"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
    **{"vocab_size": 151936, "tie_word_embeddings": True},
}
SHAPES = {"7b": QWEN_7B, "1.5b": QWEN_1_5B}
TINY = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def fill(_hf: Any, _directory: Path, chunks: list[Any], **_: Any) -> None:
    """Random weights in place of a checkpoint."""
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=0.02)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The fastest of several calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        _synchronize()
        start = time.perf_counter()
        call()
        _synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def traced(call: Callable[[], object], path: Path, most: int = 25) -> list[dict[str, Any]]:
    """Write a trace of one call; return the operations with the longest self time in ms, on the GPU if there is one."""
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as recorded:
        call()
        _synchronize()
    recorded.export_chrome_trace(str(path))

    def own_ms(event: Any) -> float:
        return float(event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3

    events = sorted(recorded.key_averages(), key=own_ms, reverse=True)[:most]
    return [{"name": e.key[:120], "calls": e.count, "ms": round(own_ms(e), 3)} for e in events]


def measure(
    config: Config, model_dir: Path, lengths: list[int], repeats: int, trace: Path | None = None
) -> dict[str, Any]:
    """One precision: figures of the statistics pass and of one optimizer step."""
    from megatron_ext.learner import weights
    from megatron_ext.learner.learner import Learner
    from megatron_ext.learner.step import TrainBatch
    from megatron_ext.rl.losses import build_loss

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with mock.patch.object(weights, "import_hf", fill):
        learner = Learner(config, model_dir, total_updates=100)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(learner.hf.vocab_size, (n + 1,), generator=generator).tolist() for n in lengths]
    total = sum(lengths)
    zeros, trained = torch.zeros(total), torch.ones(total, dtype=torch.bool)
    batch = TrainBatch(
        prompts=[row[:1] for row in tokens],
        responses=[row[1:] for row in tokens],
        old_logp=zeros,
        advantages=torch.randn(total, generator=generator),
        mask=trained,
        keep=trained,
        kl_coef=zeros,
        entropy_coef=zeros,
        is_weight=torch.ones(total),
    )
    batch.old_logp = learner.statistics(batch).logp
    share, loss = torch.full((len(lengths),), 1.0 / total, dtype=torch.float64), build_loss("ce_gppo")
    forward = ForwardFlops(learner.hf)((n, n) for n in lengths)
    timed = {
        "statistics": (forward, seconds(lambda: learner.statistics(batch), repeats)),
        "update": (3 * forward, seconds(lambda: learner.update(batch, range(len(lengths)), share, loss), repeats)),
    }
    peak = peak_tflops(card())
    result: dict[str, Any] = {"fp8": config.model.fp8 and f"{config.model.fp8}, {config.model.fp8_recipe}"}
    for name, (work, taken) in timed.items():
        rate = work / taken / 1e12
        result[name] = {"tokens_per_s": round(total / taken, 1), "tflops": round(rate, 3)}
        result[name] |= {"mfu": round(rate / peak, 3)} if peak else {}
    if trace is not None:
        result["trace"] = traced(lambda: learner.update(batch, range(len(lengths)), share, loss), trace)
    if torch.cuda.is_available():
        result["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return result


def card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def make_config(scaling: str, micro_batch_tokens: int, recompute: bool, impl: str = "auto") -> Config:
    """``scaling``: "none" for bfloat16."""
    words: dict[str, Any] = {"transformer_impl": impl}
    if scaling != "none":
        words |= {"fp8": "e4m3", "fp8_recipe": scaling}
    model = ModelConfig(dtype="bfloat16", recompute=recompute, **words)
    return Config(model=model, optim=OptimConfig(lr=1e-6), train=TrainConfig(micro_batch_tokens=micro_batch_tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--fp8", nargs="+", default=["none"], choices=["none", *fp8.RECIPES])
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--impl", choices=["auto", "local", "transformer_engine"], default="auto", help="layers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a trace of one optimizer step")
    parser.add_argument("--no-file", action="store_true", help="print results only")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short sequences, nothing is written")
    args = parser.parse_args()
    from megatron_ext.learner.model import distributed, transformer_impl

    shape = SHAPES[args.shape] | {"num_hidden_layers": args.layers} | (TINY if args.tiny else {})
    lengths = [64 if args.tiny else args.length] * args.sequences
    results = []
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(shape))
        for scaling in args.fp8:
            config = make_config(scaling, args.micro_batch_tokens, args.recompute, args.impl)
            layers = transformer_impl(config.model)
            with distributed(config.parallel, 0, alone=True):
                figures = measure(config, Path(directory), lengths, args.repeats, args.trace)
                results.append({"shape": args.shape, "layers": args.layers, "kind": layers, **figures})
            print(json.dumps(results[-1]), flush=True)
            gc.collect()  # the learner is part of reference cycles
            torch.cuda.empty_cache()  # nothing without a GPU
    if not (args.tiny or args.no_file):
        name = re.sub(r"\W+", "_", card()).lower()
        path = Path(__file__).parent / "results" / f"gpu_learner_{name}_{datetime.date.today():%Y-%m-%d}.json"
        about = {
            "card": card(),
            "torch": torch.__version__,
            "arguments": {key: str(value) for key, value in vars(args).items()},
            "results": results,
        }
        path.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
