"""Keys of Megatron `dist_checkpointing` checkpoints.

A key is the Transformer Engine spelling of a parameter name. Layers (and experts) are by default stacked: the key has
no number and the tensor has one more leading axis. Newer Megatron can also number every layer
(`non_homogeneous_layers`). Sources: megatron/core/transformer/transformer_block.py `sharded_state_dict`,
megatron/core/transformer/moe/experts.py, megatron/core/models/gpt/gpt_layer_specs.py `sharded_state_dict_keys_map`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from conversion.config import HFConfig
from conversion.mapping import megatron_names
from conversion.sharding import te_name

_NUMBERS = re.compile(r"decoder\.layers\.(\d+)\.(?:mlp\.experts\.local_experts\.(\d+)\.)?")
# What a training checkpoint holds besides the weights of the model.
_NOT_WEIGHTS = re.compile(r"(optimizer|chained_\d+|opt_param_scheduler|rng_state|rerun_state_machine_state)(\.|/|$).*")


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one parameter lies in a checkpoint: at `lead` of the leading axes, of extent `extents`, of tensor `key`."""

    key: str
    lead: tuple[int, ...] = ()
    extents: tuple[int, ...] = ()


def own_slots(hf: HFConfig, name: str) -> list[Slot]:
    """The place of a parameter, given by its local-spec name, in what Megatron saves by default.

    Layers are stacked, but numbered where some have experts and some not (`moe_layer_freq`). There are two places for
    the norm before a mixture of experts: Megatron's local layer looks for it under the fused name, the Transformer
    Engine layer under its own. With latent attention it is the other way round, for the norms of the latents and for
    that before a dense MLP.
    """
    if not hf.mixed:
        return _stacked_slots(hf, name)
    spelled_twice = _has_two(hf, name) or (hf.latent is not None and name.endswith("layernorm.weight"))
    return _numbered_slots(hf, name)[: 1 + spelled_twice]


def _has_two(hf: HFConfig, name: str) -> bool:
    match = _NUMBERS.match(name)
    return match is not None and name[match.end() :] == "pre_mlp_layernorm.weight" and hf.sparse(int(match[1]))


def _stacked_slots(hf: HFConfig, name: str) -> list[Slot]:
    match = _NUMBERS.match(name)
    if match is None:
        return [Slot(name)]
    layer, expert = match.groups()
    rest = name[match.end() :]
    if expert is not None:
        assert hf.experts is not None
        key = f"decoder.layers.mlp.experts.experts.{rest}"
        return [Slot(key, (int(layer), int(expert)), (hf.num_layers, hf.experts.count))]
    plain, lead, extents = f"decoder.layers.{rest}", (int(layer),), (hf.num_layers,)
    keys = dict.fromkeys(_spellings(hf, name, plain))
    return [Slot(key, lead, extents) for key in keys]


def _spellings(hf: HFConfig, name: str, key: str) -> tuple[str, ...]:
    """What a parameter may be called: first by Transformer Engine's layers, then by Megatron's local ones."""
    latent, moe = hf.latent is not None, _has_two(hf, name)
    return te_name(key, moe=moe, latent=latent), key if latent else te_name(key)


def _numbered_slots(hf: HFConfig, name: str) -> list[Slot]:
    """The places of a parameter in checkpoints that number their layers, the usual one first."""
    match = _NUMBERS.match(name)
    if match is None:
        return [Slot(name)]
    layer, expert = match.groups()
    rest = name[match.end() :]
    if expert is not None:
        assert hf.experts is not None
        base = f"decoder.layers.{layer}.mlp.experts.experts."
        return [Slot(base + rest, (int(expert),), (hf.experts.count,)), Slot(f"{base}{expert}.{rest}")]
    return [Slot(key) for key in dict.fromkeys((*_spellings(hf, name, name), name))]


def find_slots(hf: HFConfig, keys: Iterable[str]) -> dict[str, Slot]:
    """The place of every parameter of the model among the tensor keys of a checkpoint.

    Raises:
        ValueError: parameters without a key, or keys that belong to no parameter; lists the names.
    """
    weights = {key for key in keys if not _NOT_WEIGHTS.fullmatch(key) and "_extra_state" not in key}
    slots: dict[str, Slot] = {}
    missing = []
    used = {"output_layer.weight"} if hf.tied else set()
    for name in megatron_names(hf):
        candidates = [*own_slots(hf, name), *_stacked_slots(hf, name), *_numbered_slots(hf, name)]
        found = [slot for slot in candidates if slot.key in weights]
        if found:
            slots[name] = found[0]
            used |= {slot.key for slot in found}
        else:
            missing.append(candidates[0].key)
    if halves := sorted(key for key in weights if re.search(r"linear_fc1\.(weight|bias)_[wv]$", key)):
        raise ValueError(
            f"the checkpoint stores gate and up projections apart ({', '.join(halves[:4])}, …), as Megatron does with "
            "singleton_local_shards: load it in Megatron and save it without that option"
        )
    if missing:
        raise ValueError(f"the checkpoint lacks {', '.join(sorted(set(missing))[:8])}, which {hf.architecture} needs")
    if extra := sorted(weights - used):
        raise ValueError(f"nothing in {hf.architecture} uses the checkpoint's {', '.join(extra[:8])}")
    return slots


def _projections(hf: HFConfig) -> list[str]:
    """The linear layers that make queries, keys and values."""
    if hf.latent is None:
        return ["self_attention.linear_qkv"]
    queries = ["linear_q_proj"] if hf.latent.q_rank is None else ["linear_q_down_proj", "linear_q_up_proj"]
    return [f"self_attention.{name}" for name in (*queries, "linear_kv_down_proj", "linear_kv_up_proj")]


def extra_state_keys(hf: HFConfig) -> list[str]:
    """Keys of the (empty) extra states without which Megatron refuses to load a checkpoint into its linear layers."""
    keys = []
    for layer in range(hf.num_layers):
        prefix, place = "decoder.layers.", f"{layer}_{hf.num_layers}"
        if hf.mixed:
            prefix, place = f"decoder.layers.{layer}.", "0_1"
        modules = ["self_attention.linear_proj", "self_attention.core_attention", *_projections(hf)]
        if hf.experts is None or not hf.sparse(layer):
            modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
        else:
            if hf.experts.shared_ffn_hidden_size:
                modules += ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
            count = hf.experts.count
            for fc in ("fc1", "fc2"):
                shards = [f"{layer}.{e}_{hf.num_layers}.{count}" for e in range(count)]
                if hf.mixed:
                    shards = [f"{e}_{count}" for e in range(count)]
                keys += [f"{prefix}mlp.experts.experts.linear_{fc}._extra_state/shard_{shard}" for shard in shards]
        keys += [f"{prefix}{module}._extra_state/shard_{place}" for module in modules]
    return keys
