"""Head kernels against their peers: `python -m benchmarks.gpu_head [--shapes 8192x3584x152064] [--tiny] [--out FILE]`.

Forward and backward from hidden states (TOKENSxHIDDENxVOCAB, bfloat16) to both gradients, interleaved, the best of the
repeats. ``products``: the three bare matrix products that every method needs, and a fourth where the logits are
computed twice: the lower bound. ``ours``: four statistics with gradients through log p and entropy, logits computed
twice; ``ours, kept``: logits kept; ``ours, no entropy``: kept, gradient through log p only; ``ours, torch``: without
the Triton kernels. Peers, where installed: Liger's fused linear cross entropy (log p only), verl's linear cross entropy
(and entropy). None of them returns sum p^2 and sum p^2 log p. Values are compared with float32 before anything is
timed.

One JSON line a shape: milliseconds, peak memory beyond the input, both relative to the first. With ``--tune`` also the
times of the sums' kernel at other launches than the fixed one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.vocab_statistics import compare
from megatron_ext.kernels import linear_statistics, linear_vocab_statistics

KEEP = 1 << 40
Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, *, keep: int = 0, entropy: float = 0.01) -> Tensor:
    stats = linear_vocab_statistics(hidden, weight, targets, keep_bytes=keep)
    return (stats.logp + entropy * stats.entropy).sum() if entropy else stats.logp.sum()


def without_triton(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    with mock.patch.object(linear_statistics, "_fused", lambda _: None):
        loss = ours(hidden, weight, targets)
        gradients = torch.autograd.grad(loss, [hidden, weight])  # backward inside the patch too
    return sum((g.detach() * x).sum() for g, x in zip(gradients, (hidden, weight), strict=True))  # type: ignore[return-value]


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Any = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")
    return -(loss[0] if isinstance(loss, tuple) else loss)


def verl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logp, entropy = linear_cross_entropy(hidden, weight, targets, 1.0, "none")
    return (logp * torch.ones_like(logp) + 0.01 * entropy).sum()  # its backward takes no expanded gradient


def products(hidden: Tensor, weight: Tensor, _: Tensor, *, times: int = 3) -> None:
    """The bare products of forward and both gradients, with another forward one for ``times=4``."""
    with torch.no_grad():
        for _again in range(times - 2):
            logits = hidden @ weight.T
        logits @ weight
        logits.T @ hidden


def contenders(device: torch.device) -> dict[str, Head]:
    found: dict[str, Head] = {
        "ours, kept": partial(ours, keep=KEEP),
        "ours": ours,
        "ours, no entropy": partial(ours, keep=KEEP, entropy=0.0),
        "ours, torch": without_triton,
    }
    if device.type == "cuda":
        for name, peer in (("liger", liger), ("verl", verl)):
            try:
                x = torch.zeros(128, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
                peer(x, x, torch.zeros(128, dtype=torch.int64, device=device)).backward()
                found[name] = peer
            except Exception as error:  # a peer that does not run here is listed, not measured
                print(f"{name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
    return found


def measure(tokens: int, hidden: int, vocab: int, device: torch.device, repeats: int) -> dict[str, Any]:
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = torch.bfloat16

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype).requires_grad_()

    x, w = leaf(tokens, hidden), leaf(vocab, hidden, scale=hidden**-0.5)
    targets = torch.randint(vocab, (tokens,), generator=generator, device=device)
    heads = contenders(device)
    rows = slice(0, min(256, tokens))
    logp = (x[rows] @ w.T).float().log_softmax(-1).gather(1, targets[rows, None]).squeeze(1).detach()
    got = linear_vocab_statistics(x, w, targets).logp[rows].detach()
    error = float((logp - got).abs().max())
    assert error < 1e-3, f"log p differs from float32 by {error}"

    def run(head: Head) -> None:
        if head is without_triton:
            head(x, w, targets)
        else:
            torch.autograd.grad(head(x, w, targets), [x, w])

    calls: dict[str, Callable[[], object]] = {name: partial(run, head) for name, head in heads.items()}
    calls |= {"products, 3": partial(products, x, w, targets), "products, 4": partial(products, x, w, targets, times=4)}
    figures = compare(calls, tokens * vocab * dtype.itemsize, device, repeats)
    return {"tokens": tokens, "hidden": hidden, "vocab": vocab, "error of log p": error, **figures}


def tune(tokens: int, vocab: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of the sums' kernel on a block of logits, by launch configuration."""
    import triton

    from megatron_ext.kernels import triton_head

    logits = torch.randn(tokens, vocab, device=device, dtype=torch.bfloat16)
    targets = torch.zeros(tokens, dtype=torch.int64, device=device)
    found = {}
    for block in (1024, 2048, 4096, 8192):
        for warps in (4, 8, 16):
            with mock.patch.multiple(triton_head, _SUM_BLOCK=block, _SUM_WARPS=warps):
                state = [torch.full((tokens,), -torch.inf, device=device), torch.zeros(5, tokens, device=device)]
                state += [torch.zeros(tokens, device=device), torch.zeros(tokens, device=device)]
                call = partial(triton_head.add_sums, logits, targets, 0, *state)
                found[f"block {block}, {warps} warps"] = round(triton.testing.do_bench(call), 4)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_head", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["8192x3584x152064", "8192x1536x151936"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the program out")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    for shape in ["64x32x257"] if args.tiny else args.shapes:
        tokens, hidden, vocab = (int(part) for part in shape.split("x"))
        row = {**about, **measure(tokens, hidden, vocab, device, 1 if args.tiny else args.repeats)}
        if args.tune and device.type == "cuda":
            row["sums, ms"] = tune(tokens, min(vocab, linear_statistics._GPU_BLOCK_ELEMENTS // tokens), device)
        print(json.dumps(row), flush=True)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
