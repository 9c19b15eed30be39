"""Dequantised reading of Hugging Face weights in 8 bits with a scale for every block.

DeepSeek-V3 and the FP8 releases of other families store a weight as float8_e4m3, and with it `NAME_scale_inv`, one
factor for each block of `weight_block_size` (128 x 128) numbers (DeepSeek-V3's inference/kernel.py `weight_dequant`;
transformers, integrations/finegrained_fp8.py). The conversion is one-way: the result has the dtype of config.json, and
no `quantization_config`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from conversion.fields import Fields, shown
from conversion.hf_files import DTYPES, FLOAT8, HFReader

SCALE = "_scale_inv"  # behind the name of the weight
QUANTISATION = "quantization_config"


class DequantisedReader:
    """As `HFReader`, for a directory that has weights in 8 bits.

    Raises:
        ValueError: config.json does not describe such blocks, or a weight has no scales that fit it.
    """

    def __init__(self, base: HFReader) -> None:
        self._base, self.directory = base, base.directory
        raw: Any = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        config = Fields(raw if isinstance(raw, dict) else {})
        how = Fields(config.section(QUANTISATION), QUANTISATION)
        how.only("quant_method", "fp8", why="of weights in 8 bits only those with a scale for every block can be read")
        self._block = how.integers("weight_block_size") or []
        if len(self._block) != 2 or 0 in self._block:
            raise how.wrong("weight_block_size", "two sizes: FP8 weights are read with a scale for every block")
        named = config.text("dtype", config.text("torch_dtype", "bfloat16"))
        dtype = next((dtype for dtype in DTYPES.values() if str(dtype) == f"torch.{named}"), None)
        if dtype is None:
            raise ValueError(f"dtype={shown(named)} in config.json must name the dtype of the dequantised weights")
        self.tensors = {n: where for n, where in base.tensors.items() if not self._is_scale(n)}
        for name in self._quantised():
            self._check(name)
            self.tensors[name] = replace(self.tensors[name], dtype=dtype)

    def _quantised(self) -> list[str]:
        return [name for name, where in self._base.tensors.items() if where.dtype == FLOAT8]

    def _is_scale(self, name: str) -> bool:
        weight = self._base.tensors.get(name.removesuffix(SCALE))
        return name.endswith(SCALE) and weight is not None and weight.dtype == FLOAT8

    def _check(self, name: str) -> None:
        shape, scale = self._base.tensors[name].shape, self._base.tensors.get(name + SCALE)
        if scale is None:
            raise ValueError(f"{name} is stored in 8 bits, and {self.directory} has no {name}{SCALE} to scale it with")
        blocks = tuple(-(-extent // size) for extent, size in zip(shape, self._block, strict=False))
        if len(shape) != 2 or scale.shape != blocks:
            raise ValueError(
                f"{name}{SCALE} has shape {scale.shape} where {name} of shape {shape} needs {blocks}, one scale for "
                f"each block of {self._block[0]} x {self._block[1]}"
            )

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, in memory of their own. KeyError for an unknown name."""
        rows = self._base.rows(name, start, stop)
        if rows.dtype != FLOAT8:
            return rows
        height, width = self._block
        first, last = start // height, -(-stop // height)
        scales = self._base(name + SCALE)[first:last].float()
        scales = scales.repeat_interleave(height, 0)[start - first * height : stop - first * height]
        wide = rows.float() * scales.repeat_interleave(width, 1)[:, : rows.shape[1]]
        return wide.to(self.tensors[name].dtype)

    def __call__(self, name: str) -> Tensor:
        return self.rows(name, 0, self.tensors[name].shape[0])

    def check_rest(self, names: Iterable[str]) -> str:
        """Errors and result as those of `HFReader.check_rest`; scales are checked with their weights."""
        names = list(names)
        return self._base.check_rest([*names, *(name + SCALE for name in names if self._is_scale(name + SCALE))])

    def close(self) -> None:
        self._base.close()


def describe_unquantised(config: Path) -> None:
    """Rewrite a copy of config.json so that it says what the dequantised weights are."""
    raw = json.loads(config.read_text(encoding="utf-8"))
    if raw.pop(QUANTISATION, None) is not None:
        config.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
