"""LoRA adapters of PEFT, merged into the weights of their base model while these are read.

W + s B A in float32, rounded once to the dtype of W, where s is lora_alpha / r, or lora_alpha / sqrt(r) for
rank-stabilised LoRA (PEFT, tuners/lora/layer.py `update_layer`, `get_delta_weight`). PEFT itself rounds the product
first, so a bfloat16 result may differ from `merge_and_unload` by a unit in the last place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion.fields import Fields
from conversion.hf_files import HFReader
from conversion.pickled import PickledReader
from conversion.quantised import DequantisedReader

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


class Adapter:
    """The two small matrices and the scale of every changed weight.

    Raises:
        ValueError: not a LoRA adapter, or one with a part that is more than a low-rank product; says which.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        config = _read_config(self.directory)
        alpha, stabilised = config.number("lora_alpha", 8.0), config.flag("use_rslora")
        if not (self.directory / WEIGHTS).is_file():
            raise ValueError(f"{self.directory} has no {WEIGHTS}: save the adapter with safe_serialization=True")
        sides: dict[str, dict[str, Tensor]] = {}
        reader = HFReader(self.directory)
        for key in sorted(reader.tensors):
            match = _KEY.fullmatch(key)
            if match is None or len(reader.tensors[key].shape) != 2:
                raise ValueError(f"adapter tensor {key!r} is not a factor of a linear layer's update: not supported")
            sides.setdefault(match["module"] + ".weight", {})[match["side"]] = reader(key).float()
        reader.close()
        self.factors: dict[str, tuple[Tensor, Tensor, float]] = {}  # by base tensor: (out, r), (r, in), scale
        for name, pair in sides.items():
            if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
                raise ValueError(f"{self.directory}: lora_A and lora_B of {name} do not fit together")
            rank = pair["A"].shape[0]
            self.factors[name] = pair["B"], pair["A"], alpha / (rank**0.5 if stabilised else rank)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError when it changes a weight that the base model does not have in that shape."""
        for name, (b, a, _) in self.factors.items():
            if name not in shapes:
                raise ValueError(f"the adapter changes {name}, which the base model does not have (or has tied)")
            if shapes[name] != (b.shape[0], a.shape[1]):
                found = (b.shape[0], a.shape[1])
                raise ValueError(f"the adapter changes {name} of shape {found} but the base model's is {shapes[name]}")


class MergedReader:
    """A base model's reader that gives the weights with the adapter merged in."""

    def __init__(self, base: HFReader | PickledReader | DequantisedReader, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter
        self.directory, self.tensors = base.directory, base.tensors

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, in memory of their own. KeyError for an unknown name."""
        rows = self._base.rows(name, start, stop)
        if (factors := self._adapter.factors.get(name)) is None:
            return rows
        b, a, scale = factors
        return torch.addmm(rows.float(), b[start:stop], a, alpha=scale).to(rows.dtype)

    def __call__(self, name: str) -> Tensor:
        return self.rows(name, 0, self.tensors[name].shape[0])

    def check_rest(self, names: Iterable[str]) -> str:
        return self._base.check_rest(names)

    def close(self) -> None:
        self._base.close()


def _read_config(directory: Path) -> Fields:
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} has no {CONFIG}: give the directory of a PEFT adapter")
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    config = Fields(raw if isinstance(raw, dict) else {})
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type={config.get('peft_type')!r} in {path} is not supported: only LORA is")
    for key, allowed in (("bias", "none"), ("use_dora", False), ("fan_in_fan_out", False), ("lora_bias", False)):
        config.only(key, allowed, why=f"an adapter that can be merged as a product has {key}={allowed!r}")
    for key in ("modules_to_save", "alpha_pattern", "trainable_token_indices", "layer_replication"):
        if config.get(key):
            raise ValueError(f"{key} in {path} is not supported: merge this adapter with PEFT's merge_and_unload")
    return config
