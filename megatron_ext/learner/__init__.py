"""The only package that imports Megatron-Core. Without a GPU, importing it prepares Megatron for the CPU."""

import torch

from megatron_ext.learner import cpu

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    cpu.enable()
