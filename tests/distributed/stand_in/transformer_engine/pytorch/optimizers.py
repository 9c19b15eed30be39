"""Transformer Engine's Adam: one step count per parameter group, as a Python number, and none per parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import SGD as FusedSGD

__all__ = ["FusedAdam", "FusedSGD"]


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool,
        capturable: bool = False,  # Megatron-Core 0.19 names it
    ) -> None:
        assert adam_w_mode and not capturable
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for state in state_dict["state"].values():
            assert set(state) <= {"exp_avg", "exp_avg_sq"}, f"Transformer Engine raises KeyError for {set(state)}"
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert type(group["step"]) is int, "the kernel takes a whole number"
            beta1, beta2 = group["betas"]
            correction1, correction2 = (1 - beta ** group["step"] for beta in (beta1, beta2))
            assert group["bias_correction"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                denominator = (state["exp_avg_sq"] / correction2).sqrt().add_(group["eps"])
                p.addcdiv_(state["exp_avg"] / correction1, denominator, value=-group["lr"])
