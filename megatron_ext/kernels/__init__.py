"""Vocabulary statistics: from logits to everything that the losses, selections and diagnostics look at."""

from megatron_ext.kernels.vocab_statistics import VocabShard, vocab_statistics

__all__ = ["VocabShard", "vocab_statistics"]
