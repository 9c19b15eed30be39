"""Attention and rotary positions over packed sequences cut between ranks, against textbook formulas on whole ones.

In float64, forward and backward, at context-parallel sizes 1, 2 and 4: sequences of every kind of length, an empty
segment, grouped queries, a head size that is not hidden / heads, a softmax scale; with masks whole and in small blocks,
with and without a sliding window.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gloo
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ext.rl.packing import padded_length

SIZES = (1, 2, 4)
LENGTHS = (1, 2, 7, 0, 130, 16, 65, 3)  # real tokens; more than 64 get batches of their own
HEADS, GROUPS, CHANNELS, SCALE = 4, 2, 6, 0.3
BLOCK = 1000  # mask elements of the runs with blocks
WINDOWS = (None, 5)


def _inputs(size: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(cu_seqlens, which tokens are real, tensors): the real tokens are the same at every size."""
    generator = torch.Generator().manual_seed(5)
    padded = [padded_length(n, 2 * size if size > 1 else 1) for n in LENGTHS]
    cu_seqlens = torch.tensor([0, *padded]).cumsum(0).to(torch.int32)
    real = torch.cat([torch.arange(p) < n for p, n in zip(padded, LENGTHS, strict=True)])
    tensors = {}
    for name, heads in (("query", HEADS), ("key", GROUPS), ("value", GROUPS), ("weight", HEADS)):
        values = torch.randn(sum(LENGTHS), heads, CHANNELS, generator=generator, dtype=torch.float64)
        fill = 0.0 if name == "weight" else 7.0  # values on padding must have no effect
        tensors[name] = torch.full((len(real), heads, CHANNELS), fill, dtype=torch.float64)
        tensors[name][real] = values
    return cu_seqlens, real, tensors


# --- in the spawned processes -------------------------------------------------------------------------------------


def _process(rank: int, root: Path) -> None:
    from configs.schema import ParallelConfig
    from megatron_ext.learner import attention
    from megatron_ext.learner.model import distributed

    for size in SIZES:
        if rank < size:
            with gloo.group(rank, size, root / f"store-{size}"), distributed(ParallelConfig(cp=size), seed=1):
                for elements, window in itertools.product((attention.MASK_ELEMENTS, BLOCK), WINDOWS):
                    attention.MASK_ELEMENTS, whole = elements, attention.MASK_ELEMENTS
                    save_file(_attended(size, window), root / f"{size}-{elements == BLOCK}-{window}-{rank}")
                    attention.MASK_ELEMENTS = whole


def _attended(size: int, window: int | None) -> dict[str, Tensor]:
    """This rank's part of the output, the gradients, its tokens, and the size of the largest mask."""
    import torch.nn.functional as F
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import RotaryEmbedding, apply_rotary_pos_emb
    from megatron.core.transformer import TransformerConfig

    from megatron_ext.learner.attention import PackedAttention, packed_sequences
    from megatron_ext.learner.context_parallel import local_tokens
    from megatron_ext.learner.model import on_device

    masks, plain = [0], F.scaled_dot_product_attention

    def recorded(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        masks.append(0 if attn_mask is None else attn_mask.numel())
        return plain(*args, attn_mask=attn_mask, **kwargs)

    F.scaled_dot_product_attention = recorded
    shape: dict[str, Any] = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": HEADS}
    shape |= {"num_query_groups": GROUPS, "window_size": (window - 1, 0) if window else None}
    config = TransformerConfig(**shape, kv_channels=CHANNELS, attention_dropout=0.0, context_parallel_size=size)
    cu_seqlens, _, tensors = _inputs(size)
    packed = packed_sequences(cu_seqlens, int(cu_seqlens.diff().max()))
    held = local_tokens(cu_seqlens)
    local = {name: tensor[held].clone().requires_grad_(name != "weight") for name, tensor in tensors.items()}
    with on_device():
        frequencies = RotaryEmbedding(CHANNELS, rotary_percent=1.0, use_cpu_initialization=True)(
            packed.max_seqlen_q, packed_seq=True
        )
        group = parallel_state.get_context_parallel_group()
        query, key = (
            apply_rotary_pos_emb(local[name], frequencies, config, cu_seqlens=cu_seqlens, cp_group=group)
            for name in ("query", "key")
        )
        attention = PackedAttention(config, 1, None, "self", softmax_scale=SCALE)
        out = attention(query, key, local["value"], packed_seq_params=packed)
    (out * local["weight"].flatten(1)).sum().backward()
    F.scaled_dot_product_attention = plain
    gradients = {name: local[name].grad for name in ("query", "key", "value")}
    return {"out": out.detach().contiguous(), "held": held, "largest mask": torch.tensor(max(masks)), **gradients}


# --- the tests ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("attention")
    gloo.run(max(SIZES), _process, root, timeout_s=120)
    return root


def _textbook(window: int | None) -> dict[str, Tensor]:
    """Attention of the real tokens per sequence: rotation by position, then softmax over all earlier tokens."""
    _, _, tensors = _inputs(1)
    leaves = {name: tensor.requires_grad_(name != "weight") for name, tensor in tensors.items()}
    outputs, start = [], 0
    for length in LENGTHS:
        query, key, value = (leaves[name][start : start + length] for name in ("query", "key", "value"))
        start += length
        repeat = HEADS // GROUPS
        query, key = _rotated(query), _rotated(key).repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
        scores = scores + torch.full((length, length), float("-inf")).triu(1)
        if window:
            scores = scores + torch.full((length, length), float("-inf")).tril(-window)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.repeat_interleave(repeat, 1)))
    out = torch.cat(outputs).flatten(1)
    (out * leaves["weight"].flatten(1)).sum().backward()
    return {"out": out.detach(), **{name: leaves[name].grad for name in ("query", "key", "value")}}  # type: ignore[misc]


def _rotated(x: Tensor) -> Tensor:
    """Su et al. 2021 in the halves layout; Megatron's angles are float32."""
    angles = torch.outer(torch.arange(len(x)).float(), 1e4 ** -(torch.arange(0, CHANNELS, 2).float() / CHANNELS))
    cos, sin = angles.cos().double()[:, None], angles.sin().double()[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_attention_is_that_of_whole_sequences(root: Path, size: int, blocks: bool, window: int | None) -> None:
    cu_seqlens, real, _ = _inputs(size)
    parts = [load_file(root / f"{size}-{blocks}-{window}-{rank}") for rank in range(size)]
    held = torch.cat([part["held"] for part in parts])
    assert torch.equal(held.sort().values, torch.arange(int(cu_seqlens[-1]))), "every token on one rank"
    assert len({len(part["held"]) for part in parts}) == 1, "equal shares"
    for name, expected in _textbook(window).items():
        row = torch.empty(len(held), *expected.shape[1:], dtype=torch.float64)
        row[held] = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(row[real], expected, rtol=1e-10, atol=1e-10)
        if name != "out":
            assert not row[~real].any(), "padding gets no gradient"
    largest = max(int(part["largest mask"]) for part in parts)
    assert (largest > 0) == (size > 1 or window is not None)
    assert not blocks or largest <= BLOCK


def test_the_work_is_the_same_on_every_rank(root: Path) -> None:
    """The number of pairs of query and visible key, which zig-zag shares equalise."""
    cu_seqlens, _, _ = _inputs(4)
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), cu_seqlens.diff().long())
    position = torch.arange(int(cu_seqlens[-1])) - cu_seqlens[:-1].long()[segment]
    pairs = {int((position[load_file(root / f"4-False-None-{rank}")["held"]] + 1).sum()) for rank in range(4)}
    assert len(pairs) == 1
