"""TRL: a `GRPOTrainer` that trains with one of our losses and selections. Written against TRL 1.16.0, text models.

Generation, rewards, advantages, vLLM and the training loop stay TRL's. The loss is averaged over the tokens of the
optimizer step, as TRL's ``loss_type="dapo"``; selections see the whole generation batch on all ranks, once, before its
first update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ext.integrations.padded import loss_inputs, select
from megatron_ext.rl.diagnostics import ratio_or_zero
from megatron_ext.rl.losses import Loss
from megatron_ext.rl.objective import Coefficients, evaluate
from megatron_ext.rl.selection import Selection, build_selection
from megatron_ext.rl.types import LossInputs

UNUSED = {"beta": 0.0, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "delta": None}
"""Settings of TRL's own objective that have no effect here, and the values they must keep."""


def trainer_class(loss: Loss, selection: Selection | None = None, base: type | None = None, *, seed: int = 0) -> type:
    """A subclass of TRL's `GRPOTrainer` that minimises ``loss`` (from `build_loss`) on the tokens of ``selection``.

    The returned class refuses with a ValueError the arguments that would have no effect: `UNUSED`, and another
    ``loss_type`` than ``dapo``.
    """
    if base is None:
        from trl import GRPOTrainer as base  # type: ignore[no-redef]
    chosen = selection or build_selection("none")

    class Trainer(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            _refuse_unused(kwargs.get("args", args[2] if len(args) > 2 else None))
            super().__init__(*args, **kwargs)
            if self._entropy_bonus_enabled or self.aux_loss_enabled:
                raise ValueError("entropy_coef and router losses have no effect here: use selection entropy_bonus.")

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            """TRL's batch, with the result of the selection for every token."""
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            if selection is not None and self.model.training:
                decision, metrics = _decide(self, selection, output, seed)
                output |= decision
                _log(self, metrics)
            return output

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            logp, entropy = _token_statistics(self, model, inputs)
            old = inputs.get("old_per_token_logps")
            x = loss_inputs(logp, logp.detach() if old is None else old, inputs["advantages"], _mask(inputs), entropy)
            result = evaluate(loss, x, _coefficients(self, chosen, x, inputs))
            count = x.mask.sum()
            mean_entropy = ratio_or_zero(torch.where(x.mask, entropy.detach().reshape(-1), 0.0).sum(), count)
            _log(self, {**result.outputs.metrics, "entropy": mean_entropy})
            return result.total

    return Trainer


DECISION = ("keep", "kl_coef", "entropy_coef", "weight")
"""Fields of `SelectionOutputs` that travel in TRL's batch, as ``selected_<name>`` of shape (B, L)."""


def _refuse_unused(config: Any) -> None:
    for key, off in {**UNUSED, "loss_type": "dapo"}.items():
        if config is not None and getattr(config, key) != off:
            raise ValueError(f"GRPOConfig.{key}={getattr(config, key)!r} has no effect on this trainer: set {off!r}.")


def _decide(
    trainer: Any, selection: Selection, batch: dict[str, Any], seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the selection says of a generation batch, spread over all processes: tensors for it, and metrics."""
    with torch.no_grad():
        logp, entropy = _token_statistics(trainer, trainer.model, batch)
    out = select(
        selection,
        logp_BL=logp,
        entropy_BL=entropy,
        advantages=batch["advantages"],
        mask_BL=_mask(batch),
        seed=seed,
        step=int(trainer.state.global_step),
        first_row=logp.shape[0] * trainer.accelerator.process_index,
        reduce=_Accelerator(trainer.accelerator),
    )
    fields = {name: getattr(out, name) for name in DECISION}
    decision = {f"selected_{name}": value.view_as(logp) for name, value in fields.items() if value is not None}
    return {"old_per_token_logps": batch.get("old_per_token_logps", logp), **decision}, out.metrics


def _coefficients(trainer: Any, selection: Selection, x: LossInputs, inputs: dict[str, Any]) -> Coefficients:
    """(T,) each; a batch that the selection has not seen (evaluation) trains whole."""
    weight = torch.ones_like(x.logp).detach() / _tokens_per_step(trainer, inputs)
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        shape = inputs["completion_mask"].shape
        weight = weight * inputs["importance_sampling_ratio"].expand(shape).reshape(-1)
    found = {name: inputs[f"selected_{name}"].reshape(-1) for name in DECISION if f"selected_{name}" in inputs}
    zeros = torch.zeros_like(x.logp).detach()
    return Coefficients(
        weight,
        keep=found.get("keep", x.mask) & selection.inside(x),
        kl_coef=found.get("kl_coef", zeros),
        entropy_coef=found.get("entropy_coef", zeros),
        loss_weight=found.get("weight"),
    )


def _token_statistics(trainer: Any, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(B, L) log-probabilities and entropies of the completions."""
    ids, masks = (
        torch.cat([inputs[f"prompt_{what}"], inputs[f"completion_{what}"]], dim=1) for what in ("ids", "mask")
    )
    length, rows = inputs["completion_ids"].shape[1], trainer.args.per_device_train_batch_size
    logp, entropy, _ = trainer._get_per_token_logps_and_entropies(
        model, ids, masks, length, batch_size=rows, compute_entropy=True
    )
    return logp, entropy


def _tokens_per_step(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """Tokens of the optimizer step per process, counted as in TRL's ``dapo``."""
    tokens: Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    if trainer.model.training:
        tokens = tokens * trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
    return tokens


def _log(trainer: Any, metrics: dict[str, Tensor]) -> None:
    mode = "train" if trainer.model.training else "eval"
    for name, value in metrics.items():
        value = torch.as_tensor(value, dtype=torch.float32, device=trainer.accelerator.device)
        trainer._metrics[mode][name].append(trainer.accelerator.gather(value.reshape(1)).mean().item())


def _mask(inputs: dict[str, Any]) -> Tensor:
    mask: Tensor = inputs["completion_mask"]
    return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()


class _Accelerator:
    """`megatron_ext.rl.global_stats.Reduce` over the processes of an accelerator."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def sum(self, values: Tensor) -> Tensor:
        result: Tensor = self._accelerator.reduce(values, reduction="sum")
        return result

    def gather(self, values: Tensor) -> Tensor:
        """Of any length on each process: padded, gathered, and cut."""
        gather: Callable[[Tensor], Tensor] = self._accelerator.gather
        lengths = gather(torch.tensor([values.numel()], device=values.device)).tolist()
        padded = torch.nn.functional.pad(values, (0, max(lengths) - values.numel()))
        rows = gather(padded).reshape(len(lengths), -1)
        return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])
