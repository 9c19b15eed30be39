"""FLOPs of a model for MFU, by the standard count, and peak rates of GPUs.

The count is that of the PaLM paper (Chowdhery et al. 2022, appendix B): 6 N per token of training, with N the weights
that a token multiplies, plus attention. Three choices that it leaves open are made so:

* attention is causal: a query attends to the keys up to its own (PaLM's 12 L H Q T counts the full square, twice that);
* N has no embedding table, which is looked up; the output layer counts for response tokens only, the ones it is run
  for; of a mixture of experts the router and the experts that a token visits count;
* forward passes that are work of the algorithm (statistics, reference, values) count 2 N. Recomputed activations and
  logits, and padding, do not count, because they are not useful work.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import conversion

# Dense bfloat16 TFLOP/s by a part of the name that the driver gives; the first match counts. From NVIDIA's data sheets
# (without sparsity). GH200 and H800 have the H100's chip.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.0),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.05),
    ("A40", 149.7),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40", 181.05),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


def peak_tflops(gpu_name: str) -> float | None:
    """Dense bfloat16 peak of a GPU, or None when the table does not know it."""
    return next((peak for part, peak in PEAK_TFLOPS if part in gpu_name), None)


def layer_parameters(hf: conversion.HFConfig) -> float:
    """Weights of all layers that one token multiplies. Vectors (norms, biases) are left out."""
    total = 0.0
    for name in conversion.megatron_names(hf):
        shape = conversion.megatron_shape(hf, name)
        if name.startswith("decoder.layers.") and len(shape) == 2:
            share = hf.experts.top_k / hf.experts.count if hf.experts and ".local_experts." in name else 1.0
            total += share * prod(shape)
    return total


def attended_pairs(hf: conversion.HFConfig, length: int) -> float:
    """(query, key) pairs of a sequence, summed over layers; a sliding window ends early."""
    causal = length * (length + 1) / 2
    if hf.window is None or length <= hf.window:
        return hf.num_layers * causal
    windowed = sum(hf.window_layers) if hf.window_layers else hf.num_layers
    short = hf.window * (hf.window + 1) / 2 + (length - hf.window) * hf.window
    return windowed * short + (hf.num_layers - windowed) * causal


class ForwardFlops:
    """FLOPs of a forward pass; training takes three times as many."""

    def __init__(self, hf: conversion.HFConfig, *, outputs: int | None = None) -> None:
        """``outputs``: width of the output layer; None: the vocabulary (without padding)."""
        self._hf = hf
        self._layers = layer_parameters(hf)
        self._head = (hf.vocab_size if outputs is None else outputs) * hf.hidden_size

    def __call__(self, samples: Iterable[tuple[int, int]]) -> float:
        """Of samples given as (fed tokens, response tokens): a multiplication and an addition are two."""
        hf = self._hf
        total = 0.0
        for fed, response in samples:
            width = hf.num_heads * (hf.head_dim + hf.value_dim)  # of scores, and of the sums that they weigh
            attention = width * attended_pairs(hf, fed)
            total += 2 * (self._layers * fed + attention + self._head * response)
        return total
