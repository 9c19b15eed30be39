"""Linear layers and norms under Transformer Engine's parameter names."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.common.recipe import DelayedScaling, Recipe
from transformer_engine.pytorch.fp8 import E4M3_MAX, AmaxHistory, FP8GlobalStateManager, rounded


class TransformerEngineBaseModule(torch.nn.Module):
    """Common base: an extra state, empty unless delayed scaling is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse_wgrad_accumulation = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.fp8 = self.fp8_calibration = self.save_original_input = False
        self.amax: dict[str, AmaxHistory] = {}
        self._fp8_workspaces: dict[str, Tensor] = {}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None: ...

    def get_extra_state(self) -> Tensor:
        if not self.amax:
            return torch.empty(0, dtype=torch.uint8)
        buffer = io.BytesIO()
        torch.save({name: {"history": a.history, "scale": a.scale} for name, a in self.amax.items()}, buffer)
        return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is None or state.numel() == 0:
            return
        saved = torch.load(io.BytesIO(state.numpy().tobytes()), weights_only=True)
        for name, values in saved.items():
            self.amax[name] = AmaxHistory(len(values["history"]))
            self.amax[name].history, self.amax[name].scale = values["history"], values["scale"]

    def _operand(self, x: Tensor, recipe: Recipe, name: str) -> Tensor:
        state = None
        if isinstance(recipe, DelayedScaling):
            state = self.amax.setdefault(name, AmaxHistory(recipe.amax_history_len))
        return rounded(x, recipe, state, weight=name == "weight")

    def _product(self, x: Tensor, weight: Tensor, is_first_microbatch: bool | None) -> Tensor:
        """In FP8 the weight is rounded for the first micro-batch of a pass, or for every one if None is given."""
        recipe = FP8GlobalStateManager.recipe
        if self.fuse_wgrad_accumulation and hasattr(weight, "main_grad"):
            weight = _AddToMainGrad.apply(weight, is_first_microbatch)
        if recipe is None:
            return F.linear(x, weight)
        rows = self._operand(x.flatten(0, -2), recipe, "input")
        if "weight" not in self._fp8_workspaces or is_first_microbatch is not False:
            self._fp8_workspaces["weight"] = self._operand(weight, recipe, "weight").detach()
        used = weight + (self._fp8_workspaces["weight"] - weight).detach()
        out = F.linear(rows, used)
        if isinstance(recipe, DelayedScaling) and out.requires_grad:
            out.register_hook(self._rounded_gradient)
        return out.unflatten(0, x.shape[:-1])

    def _rounded_gradient(self, gradient: Tensor) -> Tensor:
        """At the scale of earlier backward passes, which is 1 before the first: small gradients become 0."""
        state = self.amax.setdefault("gradient", AmaxHistory(1))
        scaled = (gradient.float() * state.scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
        out = (scaled / state.scale).to(gradient.dtype)
        state.history[0] = gradient.float().abs().max()
        state.update()
        return out


class _AddToMainGrad(torch.autograd.Function):
    """As with ``fuse_wgrad_accumulation``: the gradient goes to ``main_grad``, and what autograd gets means nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, is_first_microbatch: bool | None) -> Tensor:
        ctx.weight, ctx.first = weight, is_first_microbatch is True
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        main = ctx.weight.main_grad
        main.copy_(gradient) if ctx.first else main.add_(gradient)
        ctx.weight.grad_added_to_main_grad = True
        return torch.full_like(gradient, torch.nan), None


def _parameter(*size: int, dtype: torch.dtype, device: Any, init: Callable[[Tensor], Any] | None = None) -> Any:
    parameter = torch.nn.Parameter(torch.empty(*size, dtype=dtype, device=device))
    if init is not None:
        init(parameter.data)
    return parameter


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        params_dtype: torch.dtype,
        device: Any,
        tp_size: int,
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
        init_method: Callable[[Tensor], Any],
        **_: Any,
    ) -> None:
        super().__init__()
        assert tp_size == 1, "the stand-in has no tensor parallelism"
        self.in_features, self.out_features, self.tp_size = in_features, out_features, tp_size
        self.use_bias, self.return_bias, self.parallel_mode = bias, return_bias, parallel_mode
        self.weight = _parameter(out_features, in_features, dtype=params_dtype, device=device, init=init_method)
        axis = 1 if parallel_mode == "row" else 0
        for name, value in (("tensor_model_parallel", True), ("partition_dim", axis), ("partition_stride", 1)):
            setattr(self.weight, name, value)
        self.bias = _parameter(out_features, dtype=params_dtype, device=device) if bias else torch.Tensor()

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        out = self._product(x, self.weight, is_first_microbatch)
        if self.return_bias:
            return out, self.bias
        return out + self.bias if self.use_bias else out


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, *, eps: float, normalization: str, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, **kwargs)
        assert normalization == "RMSNorm", normalization
        self.eps, self.normalization = eps, normalization
        dtype, device = kwargs["params_dtype"], kwargs["device"]
        self.layer_norm_weight = _parameter(in_features, dtype=dtype, device=device)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return super().forward(
            F.rms_norm(x, (self.in_features,), self.layer_norm_weight, self.eps), is_first_microbatch
        )


class GroupedLinear(TransformerEngineBaseModule):
    """Several products side by side: parameters ``weight0``, ``weight1``, ..."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        params_dtype: torch.dtype,
        device: Any,
        bias: bool,
        init_method: Callable[[Tensor], Any],
        **_: Any,
    ) -> None:
        super().__init__()
        assert not bias
        self.num_gemms, self.use_bias = num_gemms, bias
        for i in range(num_gemms):
            weight = _parameter(out_features, in_features, dtype=params_dtype, device=device, init=init_method)
            self.register_parameter(f"weight{i}", weight)

    def forward(self, x: Tensor, m_splits: Sequence[int], is_first_microbatch: bool | None = None) -> Tensor:
        assert FP8GlobalStateManager.recipe is None, "experts are not emulated in FP8"
        return torch.cat(
            [
                self._product(part, getattr(self, f"weight{i}"), is_first_microbatch)
                for i, part in enumerate(x.split(list(m_splits)))
            ]
        )


class RMSNorm(TransformerEngineBaseModule):
    def __init__(
        self,
        normalized_shape: int | None = None,  # the name in Megatron-Core 0.19; ``hidden_size`` in 0.16
        eps: float = 1e-5,
        *,
        hidden_size: int | None = None,
        sequence_parallel: bool,
        params_dtype: torch.dtype,
        device: Any,
        **_: Any,
    ) -> None:
        super().__init__()
        hidden_size = normalized_shape if hidden_size is None else hidden_size
        assert hidden_size is not None
        self.eps = eps
        self.weight = _parameter(hidden_size, dtype=params_dtype, device=device)
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm: ...


class Fp8Padding: ...


class Fp8Unpadding: ...
