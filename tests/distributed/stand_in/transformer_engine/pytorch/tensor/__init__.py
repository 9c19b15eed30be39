import torch


class QuantizedTensor(torch.Tensor):
    """No parameter is stored in FP8 here."""
