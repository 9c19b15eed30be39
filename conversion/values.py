"""The numbers of a conversion: cast on request, and counted if not finite."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The bits of +infinity, which NaNs of the same sign exceed, and those of -infinity, read as int16 and as uint16.
_INFINITIES = {torch.bfloat16: (0x7F80, 0xFF80), torch.float16: (0x7C00, 0xFC00)}


def count_nonfinite(numbers: Tensor) -> int:
    """Count of NaN and infinite numbers. Usually one pass without extra memory shows that there are none."""
    if numbers.dtype in _INFINITIES and numbers.is_contiguous() and numbers.numel():
        bits = numbers.view(torch.int16).numpy()  # numpy's maximum is 7 times as fast as torch's sum of bfloat16
        positive, negative = _INFINITIES[numbers.dtype]
        if bits.max() < positive and bits.view(np.uint16).max() < negative:
            return 0
    wide = torch.float64 if numbers.dtype == torch.float64 else torch.float32
    if math.isfinite(numbers.sum(dtype=wide).item()):
        return 0
    return int(numbers.numel() - numbers.isfinite().sum())  # a sum may also overflow, with every term finite


class Values:
    """Casts blocks of tensors and counts what is not finite; safe to share between threads.

    Args:
        check_finite: a NaN or an infinity is an error at once, instead of a count in `nonfinite`.
    """

    def __init__(self, check_finite: bool = False) -> None:
        self.check_finite = check_finite
        self.nonfinite: Counter[str] = Counter()  # by Hugging Face name
        self._lock = threading.Lock()

    def cast(self, name: str, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers in `dtype`. ValueError when one overflows, or is not finite under `check_finite`."""
        result = numbers.to(dtype)
        if count := count_nonfinite(result):
            if dtype != numbers.dtype and (lost := count - count_nonfinite(numbers)):
                largest = numbers[numbers.isfinite()].abs().max().item()
                raise ValueError(
                    f"{lost} numbers of {name} overflow in {dtype} (the largest is {largest:.3e}, {dtype} ends at "
                    f"{torch.finfo(dtype).max:.3e}): choose another --dtype"
                )
            if self.check_finite:
                raise ValueError(f"{count} numbers of {name} are NaN or infinite (--check-finite)")
            with self._lock:
                self.nonfinite[name] += count
        return result

    def report(self) -> str:
        """One sentence for the end of a conversion."""
        if not self.nonfinite:
            return "all numbers are finite"
        name, count = self.nonfinite.most_common(1)[0]
        return f"{self.nonfinite.total()} numbers are NaN or infinite, {count} of them in {name}"


def nonfinite_report(records: Iterable[Mapping[str, Any]]) -> str:
    """`Values.report` of all units of a conversion, from their records."""
    values = Values()
    for record in records:
        values.nonfinite.update(record["nonfinite"])
    return values.report()
