"""The policy's output layer without its product: the loss gets hidden states and weight, and never computes all logits.

See `megatron_ext.kernels.linear_vocab_statistics`.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import unwrap_model
from torch import Tensor


class HiddenStates(ColumnParallelLinear):
    """GPTModel's output layer that returns its input, with the communication that its product would need.

    hidden: (T, 1, h), this rank's part of the tokens under sequence parallelism; returns (T, 1, h), all tokens. In
    backward each tensor-parallel rank brings the part of the gradient that comes from its slice of the vocabulary:
    their sum goes on.
    """

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """The arguments and the pair are those of the layer it replaces."""
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True), None
        return copy_to_tensor_model_parallel_region(hidden), None


def put_hidden_states(chunks: list[Any]) -> None:
    """Make the last stage's output layer a `HiddenStates`; weight, marks and checkpoint names stay what they are."""
    for model in unwrap_model(chunks):
        if model.post_process:
            assert type(model.output_layer) is ColumnParallelLinear and model.output_layer.bias is None
            model.output_layer.__class__ = HiddenStates  # a new object would have to repeat all that surrounds it


def output_weight(model: Any) -> Tensor:
    """(V / tp, h): the weight of the output layer on the last pipeline stage, which may be the embedding's."""
    model = unwrap_model(model)
    tied = model.share_embeddings_and_output_weights
    weight: Tensor = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return weight
