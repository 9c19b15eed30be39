"""Vocabulary statistics for losses, selections and diagnostics, from logits or from hidden states and output
weights."""

from megatron_ext.kernels.linear_statistics import linear_vocab_statistics
from megatron_ext.kernels.vocab_statistics import VocabShard, vocab_statistics

__all__ = ["VocabShard", "linear_vocab_statistics", "vocab_statistics"]
