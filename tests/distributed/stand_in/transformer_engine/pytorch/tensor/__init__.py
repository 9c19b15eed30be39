import torch


class QuantizedTensor(torch.Tensor):
    """No parameter is ever stored in FP8 here."""
