"""Refuse a layout, lengths or a precision that the model or this machine does not allow."""

from __future__ import annotations

import importlib.util
import signal
import threading
from dataclasses import replace
from pathlib import Path

import torch

import conversion
from configs.layout import stage_layers
from configs.schema import Config
from conversion import HFConfig
from conversion.quantised import QUANTISATION
from recipes.checks import fp8
from recipes.checks.attention import check_attention, flash_attn_version
from recipes.data.sources import check_template, render_prompt

TOKENIZER_LIMIT_S = 60.0  # a chat template may loop


def check_device(config: Config) -> None:
    """Refuse a precision that this machine's GPU, or its absence, does not allow. Raises ValueError."""
    if config.model.fp8 is None:
        return
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    has_te = importlib.util.find_spec("transformer_engine") is not None
    fp8.check_device(config, capability, torch.version.cuda, has_te)


def check_model(config: Config, directory: Path, *, lengths: bool = True) -> None:
    """Refuse a layout, lengths or a precision that the model does not allow. Raises ValueError.

    ``lengths=False`` skips the check of `too_long`.
    """
    hf, p = conversion.read_config(directory), config.parallel
    if QUANTISATION in hf.raw:
        raise ValueError(
            f"model.path={directory} has a {QUANTISATION}: servers would keep such weights where the learner sends "
            "others; make a plain copy with conversion.hf_to_megatron and conversion.megatron_to_hf, and train that"
        )
    for what, size in (("attention heads", hf.num_heads), ("MLP columns", hf.ffn_hidden_size)):
        if size % p.tp:
            raise ValueError(f"parallel.tp={p.tp} does not divide the model's {size} {what}; choose a divisor")
    if hf.num_kv_heads % p.tp and p.tp % hf.num_kv_heads:
        raise ValueError(
            f"parallel.tp={p.tp} is neither a divisor nor a multiple of the model's {hf.num_kv_heads} key-value heads; "
            "choose one"
        )
    if hf.latent is not None:
        widths = {"latent of keys and values": hf.latent.kv_rank + hf.latent.rotated}
        widths |= {"latent of queries": hf.latent.q_rank} if hf.latent.q_rank else {}
        for what, size in widths.items():
            if size % p.tp:
                raise ValueError(f"parallel.tp={p.tp} does not divide the {size} channels of the model's {what}")
    stage_layers(p, hf.num_layers)
    _check_experts(config, hf)
    _check_window(config, hf)
    if config.model.batch_invariant and (_local_layers(config) or config.model.fp8 or flash_attn_version() is None):
        raise ValueError(
            "model.batch_invariant=true needs Transformer Engine in bfloat16 on a GPU, without FP8, and the package "
            "flash-attn: set model.batch_invariant=false"
        )
    if not _local_layers(config):
        check_attention(config, hf)
    if config.model.moe_permute_fusion and (hf.experts is None or _local_layers(config)):
        why = "the model has no experts" if hf.experts is None else "it needs Transformer Engine (bfloat16, on a GPU)"
        raise ValueError(f"model.moe_permute_fusion=true, but {why}: set it to false")
    fp8.check_model(config, hf)
    if config.reference.path is not None:  # it runs in the policy's place: see megatron_ext/learner/reference.py
        other = conversion.read_config(Path(config.reference.path))
        if replace(other, raw=hf.raw, max_positions=hf.max_positions) != hf:
            raise ValueError(
                f"reference.path={config.reference.path} is another model than the policy ({other.architecture}, "
                f"{hf.architecture}, or their sizes): give a checkpoint of the same model, or unset it"
            )
    if lengths and (problem := too_long(config, hf)):
        raise ValueError(problem)


def too_long(config: Config, hf: HFConfig) -> str:
    """Error for sequences longer than the model's positions, with two fixes; empty if they fit."""
    if config.rollout.max_model_len <= hf.max_positions:
        return ""
    prompt = hf.max_positions - config.rollout.max_tokens
    if prompt > 0:
        fit = f"rollout.max_model_len={hf.max_positions}, which leaves {prompt} tokens for a prompt"
    else:
        fit = f"rollout.max_tokens={3 * hf.max_positions // 4} rollout.max_model_len={hf.max_positions}"
    return (
        f"rollout.max_model_len={config.rollout.max_model_len} exceeds the model's {hf.max_positions} positions: set "
        f"{fit}, or raise max_position_embeddings to {config.rollout.max_model_len} in your copy's config.json"
    )


def check_tokenizer(config: Config, directory: Path) -> None:
    """Load the tokenizer and render a prompt as training will. Raises ValueError where that fails or takes too long."""
    from transformers import AutoTokenizer

    def give_up(*_: object) -> None:
        raise TimeoutError(f"no result after {TOKENIZER_LIMIT_S:g} s")

    what = f"model.path={config.model.path}: its tokenizer cannot be read"
    timer = threading.current_thread() is threading.main_thread()  # elsewhere there are no signals
    before = signal.signal(signal.SIGALRM, give_up) if timer else None
    if timer:
        signal.setitimer(signal.ITIMER_REAL, TOKENIZER_LIMIT_S)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        check_template(tokenizer, config.data.template)
        what = f"data.template={config.data.template!r}: a prompt cannot be made with this tokenizer"
        ids = render_prompt(tokenizer, "1 + 1", config.data.template)
    except Exception as error:  # any at all: the files are untrusted, and the chat template is a program
        if isinstance(error, ValueError) and str(error).startswith("data.template"):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{what} ({said}); give a model directory with working tokenizer files") from error
    finally:
        if timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    vocabulary = conversion.read_config(directory).vocab_size
    if bad := [i for i in ids if not 0 <= i < vocabulary]:
        raise ValueError(
            f"model.path={config.model.path}: its tokenizer gives token {bad[0]} and the model has {vocabulary}; "
            "the files are of two models"
        )


def _check_experts(config: Config, hf: HFConfig) -> None:
    p = config.parallel
    if hf.experts is None:
        if config.rollout.routing_replay:
            raise ValueError(
                "rollout.routing_replay=true, and the model has no experts: set rollout.routing_replay=null"
            )
        if p.ep > 1:
            raise ValueError(f"parallel.ep={p.ep}: the model has no experts; drop parallel.ep")
        return
    if hf.experts.count % p.ep:
        raise ValueError(f"parallel.ep={p.ep} does not divide the model's {hf.experts.count} experts; choose a divisor")
    if p.tp > 1 and not p.sp:
        raise ValueError(f"parallel.tp={p.tp} with a mixture of experts needs sequence parallelism: parallel.sp=true")


def _local_layers(config: Config) -> bool:
    """Whether this machine trains with Megatron's own layers; see `megatron_ext.learner.model.transformer_impl`."""
    model = config.model
    has_te = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    return model.transformer_impl == "local" or model.dtype != "bfloat16" or not has_te


def _check_window(config: Config, hf: HFConfig) -> None:
    """Transformer Engine's sliding windows need whole sequences; the local layers' do not."""
    longest = config.rollout.max_model_len
    if hf.window is not None and longest > hf.window and config.parallel.cp > 1 and not _local_layers(config):
        raise ValueError(
            f"parallel.cp={config.parallel.cp} with rollout.max_model_len={longest}, more than the model's sliding "
            f"window of {hf.window} tokens, is not supported by Transformer Engine: set parallel.cp=1 or "
            "model.transformer_impl=local"
        )
