"""A stand-in for Transformer Engine in plain torch, for tests on a CPU; put its parent directory on ``sys.path``.

It has the constructor arguments, parameter names, extra states and optimizer state of Transformer Engine 2.11, so that
Megatron's own Transformer Engine layers, specification and checkpointing run unmodified. Matrix products in FP8 are
emulated by rounding their operands to float8 and back, with the scaling of the recipe. It says nothing about the real
kernels, gradients in FP8, or parallelism: one process only.
"""

__version__ = "2.11.0"

from transformer_engine import common as common
from transformer_engine import pytorch as pytorch
