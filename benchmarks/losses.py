"""What a policy loss costs: forward and backward on a million tokens, one thread, beside verl's in the same process.

    python -m benchmarks.losses                    # ours, with all metrics
    .venv-verl/bin/python -m benchmarks.losses     # and verl's (`make test-integrations` makes that environment)

CPU milliseconds, the fewest of ``ROUNDS`` interleaved rounds: on a busy machine compare the quotients.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ext.rl.losses import build_loss
from megatron_ext.rl.types import LossInputs

SEQUENCES, LENGTH, ROUNDS = 1000, 1000, 12


def tensors() -> dict[str, Tensor]:
    """(T,) float32: sequences of equal length, ratios around 1, nothing masked."""
    g = torch.Generator().manual_seed(0)
    n = SEQUENCES * LENGTH
    old = -2 * torch.rand(n, generator=g)
    return {
        "old": old,
        "logp": old + 0.2 * torch.randn(n, generator=g),
        "advantages": torch.randn(SEQUENCES, generator=g).repeat_interleave(LENGTH),
        "mask": torch.ones(n, dtype=torch.bool),
        "ids": torch.arange(SEQUENCES).repeat_interleave(LENGTH),
    }


def ours(name: str, t: dict[str, Tensor], **params: Any) -> Callable[[], None]:
    leaf, loss = t["logp"].clone().requires_grad_(), build_loss(name, **params)

    def step() -> None:
        leaf.grad = None
        out = loss(LossInputs(leaf, t["old"], t["advantages"], t["mask"], t["ids"]))
        (out.loss.sum() / leaf.numel()).backward()

    return step


def verls(name: str, t: dict[str, Tensor]) -> Callable[[], None]:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig

    shape = (SEQUENCES, LENGTH)
    leaf = t["logp"].clone().requires_grad_()
    old, advantages, mask = (t[key].view(shape) for key in ("old", "advantages", "mask"))
    config = FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    fn = get_policy_loss_fn(name)

    def step() -> None:
        leaf.grad = None
        kwargs = {"old_log_prob": old, "log_prob": leaf.view(shape), "advantages": advantages, "response_mask": mask}
        mode = "seq-mean-token-mean" if name == "gspo" else "token-mean"
        fn(**kwargs, loss_agg_mode=mode, config=config)[0].backward()

    return step


def main() -> None:
    torch.set_num_threads(1)
    t = tensors()
    steps = {f"ours/{name}": ours(name, t) for name in ("ppo", "ce_gppo", "gspo", "cispo", "sapo")}
    if importlib.util.find_spec("verl"):
        steps |= {f"verl/{name}": verls(name, t) for name in ("vanilla", "gspo")}
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begin = time.thread_time()
            step()
            best[name] = min(best[name], time.thread_time() - begin)
    print(json.dumps({name: round(seconds * 1e3, 1) for name, seconds in best.items()}))


if __name__ == "__main__":
    main()
