"""The vocabulary slice of this tensor-parallel rank, in the form of the kernels' `VocabShard`."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_ext.kernels import VocabShard


def tensor_parallel_shard(
    vocab_size: int, padded_vocab_size: int, *, group: dist.ProcessGroup | None = None
) -> VocabShard | None:
    """This rank's slice of a vocabulary that is padded at its end and cut into equal contiguous slices.

    Args:
        vocab_size: number of real tokens; larger ids are padding and are excluded from every softmax.
        padded_vocab_size: rows of the (whole) output layer, a multiple of the tensor-parallel size.
        group: tensor-parallel group; by default Megatron's. Megatron must be initialised in that case.

    Returns:
        None if the local logits are the whole vocabulary without padding. Ranks at the end may hold padding only
        (``size`` 0).

    Raises:
        ValueError: if the sizes do not fit each other or the group.
    """
    if group is None:
        from megatron.core import parallel_state  # not at the top: `cpu.enable` has to run before Megatron is imported

        group = parallel_state.get_tensor_model_parallel_group()
    world, rank = group.size(), group.rank()
    if not 0 < vocab_size <= padded_vocab_size or padded_vocab_size % world:
        raise ValueError(
            f"vocab_size={vocab_size} with padded_vocab_size={padded_vocab_size} and tensor parallel size {world}: "
            "pad the vocabulary to a multiple of the tensor-parallel size that is not below its size"
        )
    if world == 1 and vocab_size == padded_vocab_size:
        return None
    columns = padded_vocab_size // world
    start = rank * columns
    size = min(max(vocab_size - start, 0), columns)

    def reduce(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if world > 1:
            dist.all_reduce(x, op=op, group=group)
        return x

    return VocabShard(
        start=start,
        size=size,
        all_reduce_sum=lambda x: reduce(x, dist.ReduceOp.SUM),
        all_reduce_max=lambda x: reduce(x, dist.ReduceOp.MAX),
    )
