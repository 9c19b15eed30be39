"""Vocabulary statistics: from logits, or from what makes them, to all that losses, selections and diagnostics see."""

from megatron_ext.kernels.linear_statistics import linear_vocab_statistics
from megatron_ext.kernels.vocab_statistics import VocabShard, vocab_statistics

__all__ = ["VocabShard", "linear_vocab_statistics", "vocab_statistics"]
