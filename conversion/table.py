"""A model family as a table: which Megatron tensor is made of which Hugging Face tensors, and how."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from conversion.config import HFConfig
from conversion.fields import Fields


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a table.

    Names may contain `{layer}` (counted over the whole model) and `{expert}` (counted over all experts of the layer).
    `parts` maps each Hugging Face name to its shape, written in the symbols of `HFConfig.sizes`. Where Hugging Face
    stores several parts as the rows of one tensor, they have its name with `#0`, `#1`, … behind it, in that order.
    """

    megatron: str
    transform: str  # a key of `transforms.TRANSFORMS`
    parts: Mapping[str, str]
    when: Callable[[HFConfig], bool] = lambda hf: True  # the tensor exists only for such configs
    layers: str = "all"  # "dense": only in layers without experts, "sparse": only in those with

    def applies(self, hf: HFConfig, layer: int | None) -> bool:
        """Whether a model has this tensor (in a layer)."""
        if not self.when(hf) or layer is None or self.layers == "all":
            return self.when(hf)
        return hf.sparse(layer) == (self.layers == "sparse")

    def shapes(self, hf: HFConfig) -> list[tuple[int, ...]]:
        """Shape of every Hugging Face part."""
        sizes = hf.sizes()
        return [tuple(sizes[symbol] for symbol in shape.split()) for shape in self.parts.values()]

    def pattern(self) -> re.Pattern[str]:
        """Regular expression for the Megatron name, with groups `layer` and `expert`."""
        text = re.escape(self.megatron)
        for group in ("layer", "expert"):
            text = text.replace(re.escape("{" + group + "}"), rf"(?P<{group}>\d+)")
        return re.compile(text)


def _no_options(config: Fields) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Family:
    """Everything that is particular to one Hugging Face architecture.

    `options` turns config.json (with defaults filled in) into the optional fields of `HFConfig`, and raises
    ValueError for a setting that Megatron-Core cannot represent.
    """

    architecture: str  # `architectures[0]` of config.json
    rules: tuple[Rule, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what transformers assumes when a key is missing
    options: Callable[[Fields], dict[str, Any]] = _no_options
    rotary: str = "whole"  # of each head: "whole" or "partial" (`partial_rotary_factor`); ", in pairs" of channels
    local_theta: float | None = (
        None  # usual base in layers with a window, if these have a rotary embedding of their own
    )
    ignored: tuple[str, ...] = (
        r".*\.rotary_emb\.inv_freq",
    )  # patterns of tensors that can be computed from the config, or with a group `beyond` of layers behind the last
