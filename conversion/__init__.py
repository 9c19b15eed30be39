"""Checkpoint conversion between Hugging Face and Megatron-Core, both ways and exact.

The names below are the pure core (torch only), which weight sync and the learner use too. See docs/conversion.md.
"""

from conversion.config import HFConfig
from conversion.families import FAMILIES
from conversion.mapping import (
    export_rows,
    export_tensors,
    hf_parts,
    hf_shapes,
    import_rows,
    import_tensor,
    megatron_names,
    megatron_shape,
    row_unit,
    unconsumed,
)
from conversion.megatron_args import (
    beyond_gpt_model,
    gpt_model_kwargs,
    inverse_frequencies,
    transformer_config,
    yarn_attributes,
)
from conversion.parse import parse_config, read_config
from conversion.sharding import layout, local_name, padded_vocab, shard, te_name, unshard
from conversion.table import Family, Rule

__all__ = [
    "FAMILIES",
    "Family",
    "HFConfig",
    "Rule",
    "beyond_gpt_model",
    "export_rows",
    "export_tensors",
    "gpt_model_kwargs",
    "hf_parts",
    "hf_shapes",
    "import_rows",
    "import_tensor",
    "inverse_frequencies",
    "layout",
    "local_name",
    "megatron_names",
    "megatron_shape",
    "padded_vocab",
    "parse_config",
    "read_config",
    "row_unit",
    "shard",
    "te_name",
    "transformer_config",
    "unconsumed",
    "unshard",
    "yarn_attributes",
]
