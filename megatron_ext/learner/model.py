"""Megatron's GPTModel from a Hugging Face configuration: process groups, layer spec, data-parallel wrapping."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

import conversion
from configs.schema import ModelConfig, OptimConfig, ParallelConfig
from megatron_ext.learner import ON_GPU, control, cpu
from megatron_ext.learner.layers import RMSNorm, finish_model, first_layer, local_layer_specs, needs_own_modules
from megatron_ext.learner.value_head import put_value_head

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def on_device() -> contextlib.AbstractContextManager[Any]:
    """Context in which Megatron's ``device="cuda"`` means the CPU if there is no GPU."""
    return contextlib.nullcontext() if ON_GPU else cpu.CudaOnCpu()


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")


def transformer_impl(model: ModelConfig) -> str:
    """The layers that ``model.transformer_impl`` selects on this machine: "transformer_engine" or "local".

    Raises ValueError if Transformer Engine is requested, or needed for FP8, and not installed.
    """
    installed = bool(gpt_layer_specs.HAVE_TE)
    if model.transformer_impl == "transformer_engine" and not installed:
        raise ValueError(
            "model.transformer_impl=transformer_engine, but Transformer Engine is not installed: see docs/gpu.md, or "
            "set model.transformer_impl=local"
        )
    chosen = model.transformer_impl
    if chosen == "auto":  # its packed attention has no float32 kernel
        chosen = "transformer_engine" if installed and ON_GPU and model.dtype == "bfloat16" else "local"
    for key in ("moe_permute_fusion", "batch_invariant"):
        if getattr(model, key) and chosen == "local":
            raise ValueError(
                f"model.{key}=true needs Transformer Engine's layers (bfloat16, on a GPU): set it to false"
            )
    if model.fp8 is not None and chosen == "local":
        raise ValueError(f"model.fp8={model.fp8} needs Transformer Engine on a GPU: set model.fp8=null")
    return chosen


@contextlib.contextmanager
def distributed(
    parallel: ParallelConfig, seed: int, *, alone: bool = False, timeout_s: float = 600.0
) -> Iterator[None]:
    """Join the process group and create Megatron's groups; undone on a clean exit.

    The group is that of torchrun's environment, or this process alone if there is none or ``alone`` is set.
    ``timeout_s``: limit of a device collective. To wait for another rank's work use `megatron_ext.learner.control`.
    """
    from datetime import timedelta

    # Warnings that Megatron causes itself: old names of collectives, missing `.grad` in its distributed optimizer.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf", module="megatron")
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    warnings.filterwarnings("ignore", message="The next bucket's parameter all-gather", module="megatron")  # settle()
    if parallel.tp > 1:  # Megatron needs kernels to start in the order of their launch; read when CUDA starts
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # torch keeps its last collectives in memory
    started_here = not torch.distributed.is_initialized()
    if started_here:
        backend = "nccl" if ON_GPU else "gloo"
        if ON_GPU:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if "WORLD_SIZE" in os.environ and not alone:
            limit, where = timedelta(seconds=timeout_s), control.rendezvous(timeout_s)
            torch.distributed.init_process_group(backend, timeout=limit, **where)
        else:  # a single process needs no port
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=timeout_s / 60,
    )
    control.barrier()
    with on_device():
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    yield
    # Not in a `finally`: after an error on one rank the others may be inside a collective, and a wait for them here
    # would turn the error into a hang.
    parallel_state.destroy_model_parallel()
    if started_here:
        torch.distributed.destroy_process_group()


def block_spec(
    config: TransformerConfig, hf: conversion.HFConfig, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's layers when it is installed; else Megatron's local ones with our attention and norm."""
    transformer_engine = config.transformer_impl == "transformer_engine"
    if transformer_engine and not hf.mixed:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    start = first_layer(config, vp_stage)
    here = slice(start, start + get_num_layers_to_build(config, vp_stage))
    if transformer_engine:
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        assert len(block.layer_specs) == here.stop - here.start
        return block
    # Without a final norm in the spec, Megatron would add torch's norm, always in float32.
    return TransformerBlockSubmodules(layer_specs=local_layer_specs(config, hf)[here], layer_norm=RMSNorm)


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def transformer_engine_settings(model: ModelConfig, moe: bool) -> dict[str, Any]:
    """Settings of TransformerConfig for kernels and precision, under Megatron's names."""
    if transformer_impl(model) == "local":
        return {"transformer_impl": "local"}
    settings: dict[str, Any] = {
        "transformer_impl": "transformer_engine",
        "apply_rope_fusion": True,  # Megatron's own loops over the sequences of a pack, in Python
        "moe_grouped_gemm": moe,
        "moe_permute_fusion": moe and model.moe_permute_fusion,
        "fp8": model.fp8,
    }
    if model.batch_invariant:
        settings |= {"batch_invariant_mode": True, "attention_backend": AttnBackend.flash}
    if model.fp8 is not None:
        at_start, at_end = model.num_layers_at_start_in_bf16, model.num_layers_at_end_in_bf16
        settings |= {
            "fp8_recipe": model.fp8_recipe,
            "first_last_layers_bf16": at_start + at_end > 0,
            "num_layers_at_start_in_bf16": at_start,
            "num_layers_at_end_in_bf16": at_end,
        }
        if model.fp8_recipe == "delayed":  # Transformer Engine's defaults; Megatron's are a history of one value
            settings |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return settings


def _without_transformer_engine(model: ModelConfig, hf: conversion.HFConfig) -> ModelConfig:
    """The same settings with Megatron's local layers. ValueError if other layers were requested by name."""
    if model.transformer_impl == "transformer_engine" or model.fp8 is not None:
        lacking = conversion.beyond_gpt_model(hf) or [
            "latent attention with gradients summed over tensor-parallel ranks"
        ]
        raise ValueError(
            f"{hf.architecture} has {' and '.join(lacking)}, which only the local layers have: "
            "set model.transformer_impl=local and model.fp8=null"
        )
    return dataclasses.replace(model, transformer_impl="local")


def transformer_config(hf: conversion.HFConfig, parallel: ParallelConfig, model: ModelConfig) -> Any:
    """Megatron's configuration: architecture from the checkpoint, layout and precision from the run."""
    # The dispatcher is set for dense models too, because Megatron checks it against variable sequence lengths anyway.
    architecture = {"moe_token_dispatcher_type": "alltoall", **conversion.transformer_config(hf)}
    architecture["activation_func"] = ACTIVATIONS[architecture["activation_func"]]
    torch_dtype = DTYPES[model.dtype]
    if "moe_router_dtype" in architecture and torch_dtype is torch.float64:
        architecture["moe_router_dtype"] = "fp64"
    recomputation: dict[str, Any] = {}
    if model.recompute:
        recomputation = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        if model.recompute_modules:
            recomputation = {"recompute_granularity": "selective", "recompute_modules": list(model.recompute_modules)}
    if needs_own_modules(hf):
        model = _without_transformer_engine(model, hf)
    kernels = transformer_engine_settings(model, moe=hf.experts is not None)
    yarn = conversion.yarn_attributes(hf)
    if yarn and kernels.get("apply_rope_fusion"):
        kernels["apply_rope_fusion"] = False  # the fused kernel ignores YaRN's attention factor in packed sequences
    if hf.latent is not None:
        # Megatron would sum the gradient of the queries' latent norm over tensor-parallel ranks, as if it were a norm
        # of single heads; our layers have the norm anyway.
        architecture["qk_layernorm"] = False
    config = (MLATransformerConfig if hf.latent is not None else TransformerConfig)(
        **architecture,
        **recomputation,
        **kernels,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,  # experts are never split: gloo cannot gather parts of different sizes
        sequence_parallel=parallel.sp,
        params_dtype=torch_dtype,
        pipeline_dtype=torch_dtype,
        bf16=torch_dtype is torch.bfloat16,
        variable_seq_lengths=True,  # packed micro-batches have different lengths; see Trainable._padding
        calculate_per_token_loss=True,  # gradients are summed, never averaged: our weights hold the denominator
        # Weights always come from a checkpoint. Initialisation stays on, because Megatron marks which parameters are
        # tensor-parallel while it initialises (without the mark the gradient norm is wrong), but fills in nothing.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        gradient_accumulation_fusion=False,  # see _accumulate_in_products
        masked_softmax_fusion=False,
        bias_dropout_fusion=ON_GPU,
        bias_activation_fusion=ON_GPU and hf.activation == "silu",  # Megatron has no fused kernel for the other
        persist_layer_norm=False,
        # With two ranks, interleaved stages send activations and gradients between the same two at once. Batched, they
        # are told apart by nothing but their order, which differs on the two sides; overlapped calls are separate.
        batch_p2p_comm=parallel.vpp == 1,
        overlap_p2p_comm=parallel.vpp > 1,
    )
    for key, value in yarn.items():
        setattr(config, key, value)
    return config


def build_chunks(
    hf: conversion.HFConfig,
    parallel: ParallelConfig,
    model_config: ModelConfig,
    *,
    optim: OptimConfig,
    value_head: bool = False,
) -> list[DistributedDataParallel]:
    """The model chunks of this rank (one per virtual pipeline stage), uninitialised, wrapped in Megatron's DDP.

    ``value_head``: a critic, whose last stage ends in a `value_head.ValueHead` and shares no weight with the first.
    """
    with on_device(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings about Megatron's own settings
        config = transformer_config(hf, parallel, model_config)
        if config.batch_invariant_mode:  # for this process: Megatron replaces torch's and Transformer Engine's products
            from megatron.core.transformer.custom_layers.batch_invariant_kernels import enable_batch_invariant_mode

            enable_batch_invariant_mode()
        kwargs = conversion.gpt_model_kwargs(hf, tp_size=parallel.tp)
        if value_head:
            kwargs["share_embeddings_and_output_weights"] = False
        chunks: list[Any] = []
        for stage in range(parallel.vpp):
            vp_stage = stage if parallel.vpp > 1 else None
            model = GPTModel(
                config=config,
                transformer_layer_spec=block_spec(config, hf, vp_stage),
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                vp_stage=vp_stage,
                **kwargs,
            )
            finish_model(model, hf)
            if value_head and model.post_process:
                put_value_head(model)
            model = model.to(device())
            chunks.append(Float16Module(config, model) if config.bf16 else model)
            for router in (module for module in model.modules() if isinstance(module, TopKRouter)):
                router._maintain_float32_expert_bias()
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=optim.distributed,
            grad_reduce_in_fp32=config.bf16,
            overlap_grad_reduce=optim.overlap_grad_reduce,
            overlap_param_gather=optim.overlap_param_gather,
            bucket_size=optim.bucket_parameters,
            check_for_nan_in_grad=False,  # the optimizer step reports it
        )
        wrapped = [DistributedDataParallel(config, ddp, c, disable_bucketing=i > 0) for i, c in enumerate(chunks)]
        _accumulate_in_products(wrapped)
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def _accumulate_in_products(chunks: list[DistributedDataParallel]) -> None:
    """Let Transformer Engine's layers add weight gradients to the float32 sums inside their matrix products.

    Otherwise Megatron adds each micro-batch's gradients in a pass of its own. Megatron's own switch
    (``gradient_accumulation_fusion``) is for all layers, and its output layer refuses it without apex's kernel.
    """
    for module in (module for chunk in chunks for module in chunk.modules()):
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def build_optimizer(
    optim: OptimConfig, dtype: str, chunks: list[DistributedDataParallel], total_updates: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Megatron's optimizer (with gradient clipping) and its learning-rate schedule over ``total_updates`` steps."""
    config = OptimizerConfig(
        optimizer=optim.optimizer,
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        sgd_momentum=0.0,
        clip_grad=optim.clip_grad,
        bf16=dtype == "bfloat16",
        params_dtype=DTYPES[dtype],
        use_distributed_optimizer=optim.distributed,
        overlap_param_gather=optim.overlap_param_gather,
    )
    with on_device():
        optimizer = get_megatron_optimizer(config, chunks)
        schedule = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0 if optim.warmup_steps else optim.lr,
            max_lr=optim.lr,
            min_lr=optim.min_lr if optim.decay != "constant" else optim.lr,
            lr_warmup_steps=optim.warmup_steps,
            lr_decay_steps=max(total_updates, optim.warmup_steps + 1),
            lr_decay_style=optim.decay,
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
    return optimizer, schedule
