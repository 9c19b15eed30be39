"""The only room that imports Megatron-Core. Importing it on a machine without a GPU prepares Megatron for the CPU."""

import torch

from megatron_ext.learner import cpu

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    cpu.enable()
