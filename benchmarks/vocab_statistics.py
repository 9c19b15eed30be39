"""Vocabulary statistics against log_softmax and F.cross_entropy: time and peak memory, same process, as ratios.

    python -m benchmarks.vocab_statistics [--device cpu] [--dtype bfloat16] [--shapes 8192x64 1024x151936x896]

Every contender runs forward and backward on the same input, interleaved; the best of the repeats counts. From logits
(TOKENSxVOCAB): ``ours`` gives four statistics with gradients through log p and H; ``log_softmax`` gives the same by the
textbook formulas, in float32; ``cross_entropy`` gives log p alone, in float32 (the least that a loss without entropy
needs). From hidden states (TOKENSxVOCABxHIDDEN): ``ours`` computes the logits block by block, twice or kept in between,
``whole_logits`` and ``log_softmax`` are the two above behind a matrix product. Peak memory is what is allocated beyond
the input, gradients included. Results of ours: benchmarks/results/vocab_statistics_*.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import date
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_ext.kernels import linear_vocab_statistics, vocab_statistics


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


def chunked(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, *, keep_bytes: int = 0) -> Tensor:
    stats = linear_vocab_statistics(hidden_TH, weight_VH, targets_T, keep_bytes=keep_bytes)
    return (stats.logp + 0.01 * stats.entropy).sum()


def through_logits(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda hidden_TH, weight_VH, targets_T: function(hidden_TH @ weight_VH.T, targets_T)


LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "log_softmax": log_softmax,
    "cross_entropy": cross_entropy,
}
HIDDEN = {
    "ours": chunked,
    "ours, logits kept": partial(chunked, keep_bytes=1 << 40),
    "whole_logits": through_logits(ours),
    "log_softmax": through_logits(log_softmax),
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


def peak_bytes(run: Callable[[], object], device: torch.device | None = None) -> int:
    """Peak bytes allocated during a call, beyond those allocated before it; default: on the GPU, if there is one."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def compare(
    calls: dict[str, Callable[[], object]], unit: int, device: torch.device, repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds (best of the interleaved repeats) and peak bytes of each call, and both relative to the first.

    ``unit``: bytes to which memory is also given as a multiple.
    """
    first = next(iter(calls))
    memory = {name: peak_bytes(call, device) for name, call in calls.items()}  # also warms up
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            best[name] = min(best[name], seconds(call, device))
    return {
        "milliseconds": {name: round(value * 1e3, 2) for name, value in best.items()},
        "peak_memory_mib": {name: round(value / 2**20, 1) for name, value in memory.items()},
        "peak_memory_in_logits": {name: round(value / unit, 2) for name, value in memory.items()},
        f"time_relative_to_{first}": {name: round(value / best[first], 2) for name, value in best.items()},
        f"memory_relative_to_{first}": {name: round(value / memory[first], 2) for name, value in memory.items()},
    }


def measure(
    tokens: int, vocab: int, hidden: int | None, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, object]:
    """Measure one shape, from logits, or with ``hidden`` from hidden states of that size and an output layer."""
    generator = torch.Generator(device=device).manual_seed(0)
    targets = torch.randint(vocab, (tokens,), generator=generator, device=device)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype).requires_grad_()

    calls: dict[str, Callable[[], object]]
    if hidden is None:
        logits = leaf(tokens, vocab)
        calls = {n: partial(lambda f: torch.autograd.grad(f(logits, targets), logits), f) for n, f in LOGITS.items()}
    else:
        states, weight = leaf(tokens, hidden), leaf(vocab, hidden).detach().mul_(hidden**-0.5).requires_grad_()
        calls = {
            n: partial(lambda f: torch.autograd.grad(f(states, weight, targets), [states, weight]), f)
            for n, f in HIDDEN.items()
        }
    return {
        "tokens": tokens,
        "vocab": vocab,
        "hidden": hidden,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **compare(calls, tokens * vocab * dtype.itemsize, device, repeats),
    }


SHAPES = ("8192x64", "1024x49152", "256x151936", "1024x151936x896")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", nargs="+", default=dtypes[:2], choices=dtypes)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="TOKENSxVOCAB or TOKENSxVOCABxHIDDEN")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without", nargs="+", default=[], help="contenders to leave out, such as log_softmax")
    args = parser.parse_args()
    for name in args.without:
        LOGITS.pop(name, None), HIDDEN.pop(name, None)
    for shape in args.shapes:
        tokens, vocab, hidden = (*(int(part) for part in shape.split("x")), None)[:3]
        assert tokens is not None and vocab is not None
        for dtype in args.dtype:
            row = measure(tokens, vocab, hidden, getattr(torch, dtype), torch.device(args.device), args.repeats)
            print(json.dumps({"date": date.today().isoformat(), **row}), flush=True)


if __name__ == "__main__":
    main()
