"""Print the plan of a run before anything starts: layout, batch arithmetic, memory, resolved configuration.

    python -m recipes.plan recipe=NAME key=value ... [gpu_gib=80]        (also: make train DRY_RUN=1)

Nothing is started and no weights are read: of the model only config.json is needed. Memory is an estimate of what the
formulas below count; CUDA context, communication buffers and fragmentation (a few GiB per GPU) come on top.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, lcm
from typing import Any

import conversion
from configs.layout import learner_processes, updates_per_epoch
from configs.load import load_config, to_yaml
from configs.schema import Config
from recipes.checks.cli import print_help, wants_help
from recipes.checks.messages import sentence
from recipes.checks.model import check_model, too_long
from recipes.checks.settings import check
from recipes.models.locate import model_location
from recipes.planning.memory import (
    data_parallel,
    layer_kind,
    learner_memory,
    longest_sample,
    micro_batch,
    parameter_count,
)

GIB = 1 << 30
HELP = """usage: python -m recipes.plan [recipe=NAME] [key=value ...] [gpu_gib=80]
       make train DRY_RUN=1 [RECIPE=NAME] [ARGS="key=value ..."]

Print what a run would do and need: layout, batch arithmetic, memory and the resolved configuration. Nothing starts. Of
the model only config.json is read, and no data is needed.

  gpu_gib=NUMBER   compare with a GPU of so many GiB; default: the GPU that is here, if any
  recipe=NAME      {recipe}

All keys of recipes.train can follow; --help SECTION lists those of a section:
  {sections}"""
# Models that a run makes itself, so that a plan needs no directory: `recipes.models.prepare`.
_LLAMA = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
GENERATED_MODELS: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA
    | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 1024},
    "smollm2": _LLAMA
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192},
}


LAYERS = {"local": "local layers", "transformer_engine": "Transformer Engine"}


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Division of a batch of rollouts. Counts are samples (responses) unless named otherwise."""

    samples: int  # per rollout step: prompts x n
    per_update: int  # per optimizer step
    per_rank: float  # per optimizer step and data-parallel rank, on average
    updates_per_step: int  # optimizer steps per rollout step
    updates: int  # optimizer steps of the whole run
    longest: int  # tokens fed for the longest sample that can occur
    micro_batch: int  # tokens of the largest micro-batch: the budget, or one sample that exceeds it


def batch_plan(config: Config) -> BatchPlan:
    """Batch arithmetic of a full batch; dynamic sampling can make a batch smaller."""
    rollout, train = config.rollout, config.train
    samples = rollout.prompts_per_step * rollout.n
    per_update = min(train.mini_batch_prompts, rollout.prompts_per_step) * rollout.n
    updates_per_step = updates_per_epoch(config) * train.epochs
    return BatchPlan(
        samples=samples,
        per_update=per_update,
        per_rank=per_update / data_parallel(config),
        updates_per_step=updates_per_step,
        updates=train.steps * updates_per_step,
        longest=longest_sample(config),
        micro_batch=micro_batch(config),
    )


def kv_cache_bytes(config: Config, hf: conversion.HFConfig) -> tuple[int, int]:
    """(bytes per token, sequences that one server holds at most) of the rollout engine's key-value cache.

    Per token: key and value of every layer, 2 layers kv_heads head_dim itemsize. A server cuts to what it is given
    (on a CPU at most 1 GiB) and makes sequences wait.
    """
    rollout = config.rollout
    item = 4 if rollout.dtype == "float32" else 2
    samples = (rollout.generated_prompts or rollout.prompts_per_step) * rollout.n
    servers = len(rollout.urls) or rollout.num_servers
    width = 2 * hf.num_kv_heads * hf.head_dim
    if hf.latent is not None:  # vLLM keeps the latent itself, and the rotated channels of the keys
        width = hf.latent.kv_rank + hf.latent.rotated
    return hf.num_layers * width * item, min(rollout.max_num_seqs, -(-samples // servers))


# ----------------------------------------------------------------------------------------------------------- advice


def savings(config: Config, hf: conversion.HFConfig) -> list[tuple[str, float]]:
    """(override, bytes per rank with it) of the settings that save learner memory, alone, largest saving first."""
    now = learner_memory(config, hf).total
    found = []
    for override, changed in _alternatives(config, hf):
        with_it = learner_memory(changed, hf).total
        if with_it < 0.99 * now:
            found.append((override, with_it))
    return sorted(found, key=lambda item: item[1])


def cheapest_recomputation(config: Config, hf: conversion.HFConfig, limit: float) -> tuple[str, float, float] | None:
    """(override, bytes per rank, cost) of the recomputation that fits ``limit`` bytes and costs least; None: none does.

    The cost is time, as a share of an update without recomputation (a forward pass is a third of it), by the products
    that are made again.
    """
    part = "moe" if hf.experts else "mlp"
    width = hf.experts.ffn_hidden_size * hf.experts.top_k if hf.experts else hf.ffn_hidden_size
    attention = 2 * hf.head_dim * (hf.num_heads + hf.num_kv_heads)
    share = 3 * width / (3 * width + attention)
    choices: tuple[tuple[str, bool, list[str], float], ...] = (
        ("model.recompute=false", False, [], 0.0),
        (f"model.recompute=true model.recompute_modules=[{part}]", True, [part], share / 3),
        ("model.recompute=true", True, [], 1 / 3),
    )
    for override, recompute, modules, cost in choices:
        changed = replace(config, model=replace(config.model, recompute=recompute, recompute_modules=modules))
        total = learner_memory(changed, hf).total
        if total <= limit:
            return override, total, cost
    return None


def _alternatives(config: Config, hf: conversion.HFConfig) -> list[tuple[str, Config]]:
    p, batch = config.parallel, batch_plan(config)
    part = "moe" if hf.experts else "mlp"
    options: list[tuple[str, Config]] = [
        (
            f"model.recompute=true model.recompute_modules=[{part}]",
            replace(config, model=replace(config.model, recompute=True, recompute_modules=[part])),
        ),
        (
            "model.recompute=true",
            replace(config, model=replace(config.model, recompute=True, recompute_modules=[])),
        ),
        ("model.dtype=bfloat16", replace(config, model=replace(config.model, dtype="bfloat16"))),
        (
            f"train.micro_batch_tokens={batch.longest}",
            replace(config, train=replace(config.train, micro_batch_tokens=batch.longest)),
        ),
        ("train.loss_chunk_tokens=0", replace(config, train=replace(config.train, loss_chunk_tokens=0))),
        ("optim.offload=true", replace(config, optim=replace(config.optim, offload=True))),
    ]

    def layout(text: str, **changes: Any) -> None:
        parallel = replace(p, **changes)
        size = parallel.tp * parallel.pp * lcm(parallel.cp, parallel.ep)
        processes = -(-learner_processes(config) // size) * size
        if processes != learner_processes(config):
            text += f" parallel.nproc={processes}"
        options.append((text, replace(config, parallel=replace(parallel, nproc=processes))))

    if hf.num_heads % (2 * p.tp) == 0 == hf.num_kv_heads % (2 * p.tp):
        layout(f"parallel.tp={2 * p.tp}", tp=2 * p.tp)
    if hf.num_layers % (2 * p.pp * p.vpp) == 0:
        layout(f"parallel.pp={2 * p.pp}", pp=2 * p.pp)
    layout(f"parallel.cp={2 * p.cp}", cp=2 * p.cp)
    if hf.experts and hf.experts.count % (2 * p.ep) == 0:
        layout(f"parallel.ep={2 * p.ep}", ep=2 * p.ep)
    if p.tp > 1:
        layout("parallel.sp=true", sp=True)
    sharded = replace(config, optim=replace(config.optim, distributed=True))
    if data_parallel(config) > 1:
        options.append(("optim.distributed=true", sharded))
    twice = 2 * learner_processes(config)
    text = f"optim.distributed=true parallel.nproc={twice}"
    options.append((text, replace(sharded, parallel=replace(p, nproc=twice))))
    return options


def remarks(config: Config, hf: conversion.HFConfig | None = None) -> list[str]:
    """Warnings that follow from the numbers."""
    batch, rollout = batch_plan(config), config.rollout
    room = rollout.max_model_len - rollout.max_tokens
    found = []
    if hf is not None and (problem := too_long(config, hf)):
        found.append(f"Will not start: {problem}.")
    if config.data.max_prompt_tokens > room:
        found.append(
            f"Prompts of more than {room} tokens do not fit: rollout.max_model_len - rollout.max_tokens is below "
            f"data.max_prompt_tokens={config.data.max_prompt_tokens}."
        )
    if batch.updates_per_step == 1 and config.train.old_logprobs == "learner":
        found.append("One optimizer step per batch: the ratio is 1, clipping never acts.")
    if batch.per_rank < 1:
        found.append(f"Only {batch.per_update} samples per optimizer step for {data_parallel(config)} data ranks.")
    if batch.longest > config.train.micro_batch_tokens:
        found.append(
            f"A longest sample has {batch.longest} tokens, more than train.micro_batch_tokens="
            f"{config.train.micro_batch_tokens}: it gets a micro-batch of its own."
        )
    if config.loss["name"] == "gspo" and config.advantage.aggregation != "seq_mean_token_mean":
        found.append(
            f"loss.name=gspo with advantage.aggregation={config.advantage.aggregation}: GSPO's objective is a mean "
            "over sequences (seq_mean_token_mean); with token means long sequences weigh more, as in Trinity-RFT."
        )
    if 0 < batch.updates <= config.optim.warmup_steps:
        found.append(f"optim.warmup_steps={config.optim.warmup_steps} lasts the whole run.")
    return found


# ---------------------------------------------------------------------------------------------------------- display


def read_model(config: Config) -> tuple[conversion.HFConfig, str]:
    """The model's sizes and where they come from. Raises ValueError for a layout that the model does not allow."""
    directory = model_location(config)
    if directory.exists():
        check_model(config, directory, lengths=False)
        return conversion.read_config(directory), str(directory)
    return conversion.parse_config(GENERATED_MODELS[config.model.path]), f"{directory}, not made yet"


def print_plan(config: Config, gpu_gib: float | None = None) -> None:
    """Print the plan and the resolved configuration.

    Args:
        gpu_gib: memory of one GPU to compare with, GiB; None: that of the GPU that is here, if any.
    """
    from rich.columns import Columns
    from rich.console import Console

    hf, source = read_model(config)
    console = Console(highlight=False, soft_wrap=False)
    console.print(f"[bold]{config.run.name}[/bold] in {config.run.dir}: {hf.architecture}, {_count(hf)} ({source})")
    console.print(Columns([_table("Work", _work_rows(config)), _table("Memory", _memory_rows(config, hf))]))
    limit = gpu_gib or _gpu_memory()
    total = learner_memory(config, hf).total
    console.print(_verdict(total, limit))
    asks = limit and (config.model.recompute or total > 0.9 * limit * GIB)
    if limit and asks and (found := cheapest_recomputation(config, hf, 0.9 * limit * GIB)):
        override, total, cost = found
        console.print(f"  Cheapest recomputation that fits: {override} ({_gib(total)}, {cost:.0%} more time an update)")
    for override, total in savings(config, hf)[:4]:
        fits = " (fits)" if limit and total <= limit * GIB else ""
        console.print(f"  {_gib(total)} with {override}{fits}")
    for remark in remarks(config, hf):
        console.print(f"[yellow]Note:[/yellow] {remark}")
    console.print("\n[bold]Configuration[/bold]")
    print(to_yaml(config), end="")


def _count(hf: conversion.HFConfig) -> str:
    parameters = parameter_count(hf)
    unit, letter = (1e9, "B") if parameters >= 1e9 else (1e6, "M")
    return f"{parameters / unit:.2f}{letter} parameters"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / (1 << 20):.1f} MiB"


def _gpu_memory() -> float | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else None


def _verdict(total: float, limit: float | None) -> str:
    if limit is None:
        return f"{_gib(total)} per learner rank (gpu_gib=80 compares with a GPU). To need less:"
    if total <= 0.9 * limit * GIB:
        return f"[green]Fits[/green] a GPU of {limit:g} GiB. To need less:"
    if total <= limit * GIB:
        return f"[yellow]Tight[/yellow] for a GPU of {limit:g} GiB. To need less:"
    return f"[red]Does not fit[/red] a GPU of {limit:g} GiB. Turn one or more of:"


def _work_rows(config: Config) -> list[tuple[str, str]]:
    p, rollout, batch = config.parallel, config.rollout, batch_plan(config)
    sizes = {"tp": p.tp, "pp": p.pp, "vpp": p.vpp, "cp": p.cp, "ep": p.ep, "dp": data_parallel(config)}
    axes = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "no parallelism"
    generated = f" of {rollout.generated_prompts} generated" if rollout.generated_prompts else ""
    servers = len(rollout.urls) or rollout.num_servers
    return [
        ("Learner processes", f"{learner_processes(config)} ({axes}{', sp' if p.sp else ''})"),
        ("Rollout", f"{rollout.engine}, {servers} server{'s' * (servers > 1)}"),
        ("Samples per step", f"{rollout.prompts_per_step} prompts{generated} x {rollout.n} = {batch.samples}"),
        ("Optimizer step", f"{batch.per_update} samples, {batch.per_rank:g} per data rank"),
        ("Optimizer steps", f"{config.train.steps} x {batch.updates_per_step} = {batch.updates}"),
        ("Longest sample", f"{batch.longest} tokens"),
        ("Micro-batch", f"up to {batch.micro_batch} tokens"),
    ]


def _memory_rows(config: Config, hf: conversion.HFConfig) -> list[tuple[str, str]]:
    memory = learner_memory(config, hf)
    per_token, sequences = kv_cache_bytes(config, hf)
    item = 4 if config.rollout.dtype == "float32" else 2
    optimizer = ", ".join(
        [config.optim.optimizer]
        + ["sharded"] * config.optim.distributed
        + ["instead of activations"] * memory.optimizer_elsewhere
    )
    full = per_token * sequences * config.rollout.max_model_len
    return [
        (f"Weights ({config.model.dtype})", _gib(memory.weights)),
        ("Gradients", _gib(memory.gradients)),
        (f"Optimizer ({optimizer})", _gib(memory.optimizer)),
        (f"Activations{' (recomputed)' if config.model.recompute else ''}", _gib(memory.activations)),
        ("Loss, or a layer's backward", _gib(memory.momentary)),
        (f"[bold]Learner rank[/bold] ({LAYERS[layer_kind(config)]})", f"[bold]{_gib(memory.total)}[/bold]"),
        *([("Host memory per rank", _gib(memory.host))] if memory.host else []),
        ("Weights per server", _gib(parameter_count(hf) * item)),
        (f"KV cache, {sequences} full sequences", _gib(full)),
        *(
            [("Colocated: a GPU's server, in turns", _gib(parameter_count(hf) * item + full))]
            * config.rollout.colocated
        ),
    ]


def _table(title: str, rows: Sequence[tuple[str, str]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False, pad_edge=False)
    for name, value in rows:
        table.add_row(name, value)
    return table


def _gpu_gib(arguments: Sequence[str]) -> float | None:
    """The number in the last ``gpu_gib=NUMBER``."""
    if not arguments:
        return None
    try:
        value = float(arguments[-1].removeprefix("gpu_gib="))
    except ValueError:
        raise ValueError(f"{arguments[-1]} is not a number: give the memory of one GPU in GiB") from None
    if not 0 < value < inf:
        raise ValueError(f"{arguments[-1]} must be above 0: give the memory of one GPU in GiB")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if wants_help(arguments):
        return print_help(arguments, HELP)
    try:
        limit = _gpu_gib([a for a in arguments if a.startswith("gpu_gib=")])
        config = load_config([a for a in arguments if not a.startswith("gpu_gib=")])
        check(config, data=False)
        print_plan(config, limit)
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
