"""Vocabulary statistics beside log_softmax and F.cross_entropy: time and peak memory, same process, as ratios.

    python -m benchmarks.vocab_statistics [--device cpu] [--dtype bfloat16] [--shapes 8192x64 1024x49152]

Every contender runs forward and backward on the same logits, interleaved; the best of the repeats counts. ``ours``
gives four statistics with gradients through log p and H; ``log_softmax`` gives the same by the textbook, in float32;
``cross_entropy`` gives log p alone, in float32 (the least that a loss without entropy needs). Peak memory is what is
allocated beyond the logits, the gradient included: at least 1.00 in units of the logits' size.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_ext.kernels import vocab_statistics


def ours(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    stats = vocab_statistics(logits_TV, targets_T)
    return (stats.logp + 0.01 * stats.entropy).sum()


def log_softmax(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    logp_TV = logits_TV.float().log_softmax(dim=-1)
    p_TV = logp_TV.exp()
    logp_T = logp_TV.gather(1, targets_T[:, None]).squeeze(1)
    entropy_T = -(p_TV * logp_TV).sum(-1)
    with torch.no_grad():
        p2_TV = p_TV.square()
        p2_TV.sum(-1), (p2_TV * logp_TV).sum(-1)
    return (logp_T + 0.01 * entropy_T).sum()


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    return -torch.nn.functional.cross_entropy(logits_TV.float(), targets_T, reduction="sum")


CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "log_softmax": log_softmax,
    "cross_entropy": cross_entropy,
}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, device work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that live at once during a call, beyond what lived before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    level = peak = 0
    assert recorded.profiler is not None
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def measure(tokens: int, vocab: int, dtype: torch.dtype, device: torch.device, repeats: int) -> dict[str, object]:
    """One shape: milliseconds, peak memory in units of the logits, and both relative to ours."""
    generator = torch.Generator(device=device).manual_seed(0)
    logits = torch.randn(tokens, vocab, generator=generator, device=device).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator, device=device)

    def call(name: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(CONTENDERS[name](logits, targets), logits)

    size = logits.numel() * logits.element_size()
    memory = {name: peak_bytes(call(name), device) / size for name in CONTENDERS}  # also warms up
    best = dict.fromkeys(CONTENDERS, float("inf"))
    for _ in range(repeats):
        for name in CONTENDERS:
            best[name] = min(best[name], seconds(call(name), device))
    return {
        "tokens": tokens,
        "vocab": vocab,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "milliseconds": {name: round(value * 1e3, 2) for name, value in best.items()},
        "peak_memory_in_logits": {name: round(value, 2) for name, value in memory.items()},
        "time_relative_to_ours": {name: round(value / best["ours"], 2) for name, value in best.items()},
        "memory_relative_to_ours": {name: round(value / memory["ours"], 2) for name, value in memory.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", nargs="+", default=dtypes[:2], choices=dtypes)
    parser.add_argument("--shapes", nargs="+", default=["8192x64", "1024x49152", "256x151936"], help="TOKENSxVOCAB")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for shape in args.shapes:
        tokens, vocab = (int(part) for part in shape.split("x"))
        for dtype in args.dtype:
            print(json.dumps(measure(tokens, vocab, getattr(torch, dtype), torch.device(args.device), args.repeats)))


if __name__ == "__main__":
    main()
