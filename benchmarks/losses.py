"""Cost of a policy loss: forward and backward on a million tokens, one thread, and a peer's in the same process.

    python -m benchmarks.losses                    # ours, with all metrics
    .venv-verl/bin/python -m benchmarks.losses     # and verl's (`make test-integrations` makes that environment)
    .venv-trl/bin/python -m benchmarks.losses      # and TRL's: `GRPOTrainer._compute_loss` with the model taken out

CPU milliseconds, the fewest of ``ROUNDS`` interleaved rounds: on a busy machine compare the ratios.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
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


def trls(level: str, t: dict[str, Tensor]) -> Callable[[], None]:
    """TRL's objective at an ``importance_sampling_level``, with its metrics; its trainer without a model."""
    from trl import GRPOTrainer

    shape = (SEQUENCES, LENGTH)
    leaf = t["logp"].clone().requires_grad_()
    entropies = torch.ones(shape)
    ids, mask = torch.zeros(shape, dtype=torch.long), t["mask"].view(shape).long()
    trainer: Any = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (leaf.view(shape), entropies, None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        loss_type="dapo",
        importance_sampling_level=level,
        epsilon_low=0.2,
        epsilon_high=0.2,
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": t["advantages"].view(shape)[:, 0],
        "old_per_token_logps": t["old"].view(shape),
        "num_items_in_batch": torch.tensor(float(leaf.numel())),
    }

    def step() -> None:
        leaf.grad = None
        GRPOTrainer._compute_loss(trainer, None, inputs).backward()

    return step


def main() -> None:
    torch.set_num_threads(1)
    t = tensors()
    steps = {f"ours/{name}": ours(name, t) for name in ("ppo", "ce_gppo", "gspo", "cispo", "sapo")}
    if importlib.util.find_spec("verl"):
        steps |= {f"verl/{name}": verls(name, t) for name in ("vanilla", "gspo")}
    if importlib.util.find_spec("trl"):
        steps |= {f"trl/dapo, {level} ratio": trls(level, t) for level in ("token", "sequence")}
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begin = time.thread_time()
            step()
            best[name] = min(best[name], time.thread_time() - begin)
    print(json.dumps({name: round(seconds * 1e3, 1) for name, seconds in best.items()}))


if __name__ == "__main__":
    main()
