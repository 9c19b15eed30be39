"""Start a training from a command line: help, plan, model directory, processes, and errors as one sentence."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import conversion
from configs.layout import learner_processes, process_multiple
from configs.load import load_config
from configs.schema import Config
from megatron_ext.sync.process_guard import PR_SET_PDEATHSIG
from recipes.checks.cli import print_help, wants_help
from recipes.checks.messages import sentence
from recipes.checks.model import check_device, check_model, check_tokenizer
from recipes.checks.settings import check
from recipes.cluster import foreground
from recipes.models.locate import model_location, prepare_model
from recipes.plan import print_plan
from recipes.planning.machine import check_machine
from recipes.rewards.terms import check_reward

HELP = """usage: python -m recipes.train [recipe=NAME] [key=value ...]
       make train [RECIPE=NAME] [ARGS="key=value ..."] [DRY_RUN=1]

Train a policy: generate, judge, update, evaluate, save, until train.steps. Ctrl-C stops after the current step with a
checkpoint, a second one at once; the same command again continues.

  recipe=NAME      {recipe}
  loss=NAME        {loss}
  selection=NAME   {selection}
  schedule=NAME    {schedule}

Any key can follow; --help SECTION lists those of a section with type, default and meaning:
  {sections}
For example
  loss.beta1=0.75 optim.lr=1e-6 train.steps=200 rollout.n=16 parallel.tp=2 seed=1
  run.dir=DIR              everything the run writes; the same directory again resumes it
  rollout.replay=DIR       train on the recorded rollouts of another run, without any server
  rollout.engine=local     generate in process, without vLLM
  logging=[tensorboard,wandb]   show the run in a tracker too (also mlflow, trackio; docs/tracking.md)
  run.dry_run=true         print the plan and the resolved configuration, and stop"""


NOT_FINITE = 5  # exit status; a job that ends with it is not requeued: the same batch would come again


# Messages of torch when the disk is full while it writes an archive.
TORN_WRITE = re.compile(r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed|file write failed")


def launch(train: Callable[[Config, Path], None], argv: Sequence[str] | None = None) -> int:
    """Run ``train`` with the configuration of the command line; the exit status. User errors are one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        follow_torchrun()
    if wants_help(argv):
        return print_help(argv, HELP)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading a model, which is short
    try:
        config = load_config(argv)
        check(config, data=not config.run.dry_run)
        if config.run.dry_run:
            print_plan(config)
            return 0
        model_dir = model_location(config)
        if int(os.environ.get("RANK", "0")) == 0:
            check_device(config)
            check_reward(config.reward, load=True)
            prepare_model(config, model_dir)
            check_model(config, model_dir)
            check_tokenizer(config, model_dir)
            if "WORLD_SIZE" not in os.environ:
                for remark in check_machine(config, conversion.read_config(model_dir)):
                    print(f"note: {remark}", file=sys.stderr)
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
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_FINITE
    except RuntimeError as error:
        if not TORN_WRITE.search(str(error)):
            raise
        print(f"error: a file could not be written whole: free space for run.dir={config.run.dir}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; start again with the same run.dir to continue from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def follow_torchrun() -> None:
    """Kill this rank when torchrun ends, for any reason."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def relaunch(processes: int, argv: Sequence[str]) -> None:
    """Replace this process by torchrun with as many learner processes on this machine, behind `foreground`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout.flush()
    guard = [sys.executable, "-I", "-S", foreground.__file__]
    os.execv(sys.executable, [*guard, *command, "-m", "recipes.train", *argv])
