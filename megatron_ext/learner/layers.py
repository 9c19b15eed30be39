"""Megatron's local transformer layers for every family that conversion supports, as a layer spec.

Some families need modules that Megatron-Core does not have: norms after attention and MLP, an RMSNorm over all heads,
constant factors on branches, embedding and logits, other rotary frequencies, also by layer, and latent attention with
correct gradients under tensor parallelism.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer import MLATransformerConfig, TransformerConfig, multi_latent_attention
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

import conversion
from conversion.megatron_args import LATENT_EPSILON
from megatron_ext.learner import ON_GPU
from megatron_ext.learner.attention import PackedAttention

if not isinstance(multi_latent_attention.TELinear, type):  # Megatron 0.16 takes its own stand-in for the package
    multi_latent_attention.HAVE_TE = False


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor and the attribute that Megatron expects.

    Under sequence parallelism each tensor-parallel rank has a part of the tokens, so the weight's gradient must be
    summed over the ranks; Megatron does so for parameters marked ``sequence_parallel``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.plus_one = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        if not self.plus_one:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, torch.float32)  # as Gemma: 1 + weight would lose bits in bfloat16
        normalised = torch.nn.functional.rms_norm(x.to(wide), self.normalized_shape, eps=self.eps)
        return (normalised * (1 + self.weight.to(wide))).to(x.dtype)


class NormOverHeads(torch.nn.Module):
    """RMSNorm over all heads of the queries (or keys) of a token; tensor parallelism distributes the heads over ranks.

    In and out: (..., this rank's heads, channels). The weight is split over the ranks, not replicated. Its name differs
    from that of a norm per head, because Megatron sums the gradient of that one over tensor-parallel ranks by name.
    """

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float, *, keys: bool) -> None:
        super().__init__()
        heads = config.num_query_groups if keys else config.num_attention_heads
        ranks = config.tensor_model_parallel_size
        if heads % ranks:
            raise ValueError(f"parallel.tp={ranks} does not divide the {heads} key-value heads: choose a smaller one")
        self.eps, self.width, self.ranks = eps, heads * hidden_size, ranks
        weight = torch.ones(heads // ranks * hidden_size, dtype=config.params_dtype, device=_device())
        self.weight_over_heads = torch.nn.Parameter(weight)
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight_over_heads, True, 0, 1)

    def forward(self, states: Tensor) -> Tensor:
        flat = states.flatten(-2)
        wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
        squares = wide.square().sum(-1, keepdim=True)
        if self.ranks > 1:  # a sum over ranks, forward and backward: every rank's output depends on every rank's input
            summed = tensor_parallel.reduce_from_tensor_model_parallel_region(squares)
            squares = tensor_parallel.copy_to_tensor_model_parallel_region(summed)
        normalised = wide * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight_over_heads * normalised).to(flat.dtype).view_as(states)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        state = self.state_dict(prefix="", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, {"weight_over_heads": 0}, sharded_offsets
        )
        return sharded


class BranchProjection(RowParallelLinear):
    """The output projection of attention or MLP, followed by a norm, a constant factor, or both."""

    def __init__(self, *args: Any, post_norm: bool, scale: float, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.scale = scale
        self.post_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon) if post_norm else None

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        if self.post_layernorm is not None:
            assert bias is None, "a bias would have to be added before the norm"
            output = self.post_layernorm(output)
        if self.scale != 1:
            output, bias = output * self.scale, None if bias is None else bias * self.scale
        return output, bias


class OwnAttention(SelfAttention):
    """Attention with norms over all heads, or with a rotary embedding that is not the model's, or both.

    ``theta``: base of that embedding, which is not scaled; None: the layer uses the model's.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, theta: float | None, norm_over_heads: bool, **kwargs: Any
    ) -> None:
        own, had = copy.copy(config), config.qk_layernorm
        if theta is not None:
            for key in [key for key in vars(own) if key.startswith("yarn_")]:
                delattr(own, key)  # their presence alone scales cosine and sine
        own.qk_layernorm = had or norm_over_heads  # without it Megatron 0.19 builds no norm
        super().__init__(own, *args, **kwargs)
        own.qk_layernorm = had
        channels = torch.arange(0, config.kv_channels, 2, dtype=torch.float32, device=_device())
        self.frequencies = None if theta is None else 1.0 / theta ** (channels / config.kv_channels)

    def forward(self, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        if self.frequencies is not None:
            model_wide = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
            positions = torch.arange(len(model_wide), dtype=torch.float32, device=self.frequencies.device)
            angles = torch.outer(positions, self.frequencies)
            rotary_pos_emb = torch.cat((angles, angles), -1)[:, None, None]
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)


class LatentNorm(RMSNorm):
    """The norm of a latent, whose epsilon is fixed."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config, hidden_size, LATENT_EPSILON)


class LatentAttention(MLASelfAttention):
    """Megatron's latent attention with the gradient of the keys' rotated channels summed over tensor-parallel ranks.

    These channels are shared by all heads, and each rank has some of the heads. Megatron 0.16 splits the projection to
    them over the ranks and gathers its output, but in the backward pass each rank gets only its own gradient. Here a
    hook gathers the output and splits the sequence instead; Megatron then gathers the sequence of the rotated channels
    and sums their gradient. Without sequence parallelism it cannot train a mixture of experts.
    """

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # Not in the spec: Megatron 0.19 takes norms of latents from there only with `qk_layernorm`, and with that it
        # needs Transformer Engine where queries have no latent.
        if config.q_lora_rank is not None:
            self.q_layernorm = LatentNorm(config, config.q_lora_rank)
        self.kv_layernorm = LatentNorm(config, config.kv_lora_rank)
        if self.config.sequence_parallel:
            self.linear_kv_down_proj.register_forward_hook(self._gather)

    def _gather(self, module: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(output[0])
        return scatter_to_sequence_parallel_region(whole), output[1]


def _given(module: type, **arguments: Any) -> type:
    """A class with some arguments of the constructor given.

    All versions of Megatron-Core build classes, but only 0.16 builds a nested ModuleSpec, and only 0.19 a partial.
    """
    given = functools.partialmethod(module.__init__, **arguments)  # type: ignore[misc]
    return type(module.__name__, (module,), {"__init__": given})


def needs_own_modules(hf: conversion.HFConfig) -> bool:
    """Whether a model needs modules of this file, which exist only for Megatron's local layers."""
    branches = hf.norms != "before" or hf.residual_scale != 1
    return branches or hf.qk_norm_over_heads or hf.latent is not None or hf.local_rope is not None


_FUSED_WITH_LATENT = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def local_layer_specs(config: TransformerConfig, hf: conversion.HFConfig) -> list[ModuleSpec]:
    """The layers of the whole model, in order."""
    kinds = [(hf.sparse(layer), hf.window_layers[layer : layer + 1] != (False,)) for layer in range(hf.num_layers)]
    specs = {
        (sparse, windowed): _local_layer(config, hf, config.num_moe_experts if sparse else None, windowed)
        for sparse, windowed in set(kinds)
    }
    return [specs[kind] for kind in kinds]


def _local_layer(config: TransformerConfig, hf: conversion.HFConfig, experts: int | None, windowed: bool) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(
        num_experts=experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        multi_latent_attention=hf.latent is not None,
    )
    layer = spec.submodules
    attention = layer.self_attention.submodules
    identity = layer.pre_cross_attn_layernorm
    if hf.latent is not None:
        layer.self_attention.module = LatentAttention
        attention.q_layernorm = attention.kv_layernorm = identity
        # Saved under the names of Transformer Engine's layers, which fuse these norms. Megatron's local spec does not
        # do so.
        layer.sharded_state_dict_keys_map = dict(_FUSED_WITH_LATENT)
    theta = hf.local_rope.theta if hf.local_rope is not None and windowed else None
    if theta is not None or hf.qk_norm_over_heads:
        layer.self_attention.module = OwnAttention
        own = {"theta": theta, "norm_over_heads": hf.qk_norm_over_heads}
        layer.self_attention.params = {**layer.self_attention.params, **own}
    attention.core_attention = PackedAttention
    layer.input_layernorm = layer.pre_mlp_layernorm = identity if hf.norms == "after" else RMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if hf.qk_norm_over_heads:
        attention.q_layernorm, attention.k_layernorm = (
            _given(NormOverHeads, keys=False),
            _given(NormOverHeads, keys=True),
        )
    if hf.norms != "before" or hf.residual_scale != 1:
        attention.linear_proj = _given(BranchProjection, post_norm=hf.norms != "before", scale=hf.residual_scale)
        layer.mlp = copy.deepcopy(layer.mlp)  # Megatron shares it between calls
        newer = isinstance(layer.mlp, functools.partial)  # 0.19; in 0.16 it is a ModuleSpec
        parts = layer.mlp.keywords["submodules"] if newer else layer.mlp.submodules
        parts.linear_fc2 = attention.linear_proj
    if experts:
        # Megatron's local layers save this norm as if it were fused with the MLP; Transformer Engine's do not fuse it.
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return spec


def finish_model(model: Any, hf: conversion.HFConfig) -> None:
    """Settings that GPTModel's constructor does not take: rotary frequencies, factors on embedding and logits,
    groups."""
    if model.config.tensor_model_parallel_size > 1:
        for name, parameter in model.named_parameters():
            # Without expert parallelism Megatron 0.16 sums gradients of experts over the data-parallel ranks alone. But
            # each tensor-parallel rank has all experts and sees part of the tokens: they belong to the group of expert
            # data parallelism, which has these ranks too.
            if ".mlp.experts." in name:
                parameter.allreduce = False
    if (frequencies := conversion.inverse_frequencies(hf)) is not None:
        model.rotary_pos_emb.inv_freq = frequencies.to(model.rotary_pos_emb.inv_freq.device)
    if model.pre_process and hf.embedding_scale != 1:

        def scale(module: Any, inputs: Any, output: Tensor) -> Tensor:
            return output * torch.tensor(hf.embedding_scale, dtype=output.dtype).item()  # rounded, as transformers does

        model.embedding.register_forward_hook(scale)
    if model.post_process and hf.logits_divisor != 1:
        # on the hidden state, because the policy head never computes all logits
        model.decoder.final_layernorm.register_forward_hook(lambda module, inputs, output: output / hf.logits_divisor)


def first_layer(config: TransformerConfig, vp_stage: int | None) -> int:
    """The number of this stage's first layer, counted over the whole model from 0."""
    return int(get_transformer_layer_offset(config, vp_stage, parallel_state.get_pipeline_model_parallel_rank()))
