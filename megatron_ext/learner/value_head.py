"""The scalar output layer that makes a critic of Megatron's GPTModel."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

WEIGHT = "output_layer.weight"  # its name in the model; Megatron's checkpointing looks for a tensor of this name


class ValueHead(torch.nn.Module):
    """One number per token, instead of GPTModel's ``output_layer``.

    hidden: (T, 1, h), this rank's part of the tokens under sequence parallelism; returns (T, 1, 1), all tokens.
    Zero-initialised, so the first values are 0 and the first advantages equal those without a critic. It stays float32
    in a bfloat16 model, because bfloat16 cannot represent the differences between returns.

    The weight is replicated over tensor-parallel ranks. All have the same hidden states and compute the same gradient,
    which Megatron's gradient norm counts on one of them. Under sequence parallelism each has a part of the tokens, and
    the attribute makes Megatron sum the gradients.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dtype = torch.float64 if config.params_dtype == torch.float64 else torch.float32
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.sequence_parallel = config.sequence_parallel

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """The arguments and the pair are those of the layer it replaces."""
        assert weight is None, "a critic shares no weight with its embedding"
        values = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight)
        if self.sequence_parallel:  # every rank computes the same from here, so backward takes its own part only
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None

    def _apply(self, fn: Any, recurse: bool = True) -> ValueHead:
        """Moves to another device, but keeps its precision when Megatron casts the model to bfloat16."""
        dtype = self.weight.dtype
        super()._apply(fn, recurse)
        self.weight.data = self.weight.data.to(dtype)
        return self


def put_value_head(model: Any) -> None:
    """Replace the output layer of a GPTModel, before it is cast and wrapped.

    The head becomes the model's first module. Under bfloat16 it alone is float32, and Megatron 0.16's distributed
    optimizer lists float32 parameters first but finds them, when it saves, by the order of the model's.
    """
    del model.output_layer
    others = dict(model._modules)
    model._modules.clear()
    model.output_layer = ValueHead(model.config)
    model._modules.update(others)
