"""The first hour on a GPU: `python -m benchmarks.gpu_day [--minutes 25] [--out DIR] [--only PART ...]`.

Runs the measurements that describe this machine, the most valuable first: the doctor, the quick start with the local
engine, the head kernels against their peers, the learner in bfloat16 (Transformer Engine, local layers, FP8 recipes),
checkpoint memory, weight updates on one GPU, utilisation at a 1.5B model and at a 7B model's shape with fewer layers,
the memory plan against measurements, a trace of one step, a short study. Every part is a process of its own with its
own limit. Its result is written when it ends (``DIR/PART.json``), and ``DIR/day.json`` names all of them with card,
driver, versions and date; so an interruption loses no finished result. A part that fails or takes too long does not
affect the others.

Without a GPU the same parts run with tiny sizes. This tests the program; the figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TAIL = 4000  # characters kept of a part's output
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "vllm", "transformers", "liger-kernel", "verl")


@dataclass(frozen=True, slots=True)
class Part:
    """One measurement. ``words`` are the arguments of `python -m`; ``{out}`` in them is the directory of results."""

    name: str
    question: str
    words: tuple[str, ...]
    minutes: float  # limit
    tiny: tuple[str, ...]  # the arguments for a CPU, where the part takes seconds
    needs: str = ""  # the part is skipped when this package is missing


_TINY_RUN = (
    *("train.steps=1", "rollout.prompts_per_step=2", "rollout.n=2", "rollout.max_tokens=4", "reward.name=random"),
    *("train.mini_batch_prompts=2", "eval.problems=2", "eval.n=1", "eval.k=[1]", "run.report_every=0"),
    *("model.warm_start.max_steps=1", "model.warm_start.min_steps=0", "model.warm_start.check_problems=1"),
    *("model.warm_start.target_greedy_accuracy=0", "model.cache_dir={out}/cache"),
)
_LEARNER = ("benchmarks.gpu_learner", "--no-file")
PARTS = (
    Part("doctor", "what is this machine?", ("recipes.doctor",), 1, ("recipes.doctor",)),
    Part(
        "quickstart",
        "does a run learn on the GPU, with the local engine?",
        ("recipes.train", "recipe=quickstart", "rollout.engine=local", "run.dir={out}/quickstart"),
        4,
        ("recipes.train", "recipe=quickstart", "rollout.engine=local", "run.dir={out}/quickstart", *_TINY_RUN),
    ),
    Part("head", "head kernels beside their peers", ("benchmarks.gpu_head",), 3, ("benchmarks.gpu_head", "--tiny")),
    Part(
        "learner",
        "learner in bfloat16, local layers",
        (*_LEARNER, "--impl", "local", "--layers", "4"),
        2.5,
        (*_LEARNER, "--impl", "local", "--tiny", "--layers", "1", "--sequences", "2", "--repeats", "1"),
    ),
    Part(
        "transformer_engine",
        "learner with Transformer Engine, and FP8",
        (*_LEARNER, "--layers", "4", "--fp8", "none", "blockwise", "tensorwise"),
        4,
        (*_LEARNER, "--tiny", "--layers", "1"),
        needs="transformer_engine",
    ),
    Part(
        "checkpoint",
        "memory of saving and loading",
        ("benchmarks.checkpoint_memory", "--ranks", "1"),
        1.5,
        ("benchmarks.checkpoint_memory", "--ranks", "1", "--tiny"),
    ),
    Part(
        "weights",
        "weights to a process on the same GPU: shared memory beside files",
        ("benchmarks.gpu_weights",),
        2.5,
        ("benchmarks.gpu_weights", "--tiny"),
    ),
    Part(
        "mfu_1.5b",
        "utilisation at Qwen2.5-1.5B, all layers",
        (*_LEARNER, "--shape", "1.5b", "--layers", "28", "--micro-batch-tokens", "8192"),
        2.5,
        (*_LEARNER, "--shape", "1.5b", "--tiny", "--layers", "1", "--sequences", "2", "--repeats", "1"),
    ),
    Part(
        "mfu_7b",
        "utilisation at Qwen2.5-7B's shape, six layers",
        (*_LEARNER, "--shape", "7b", "--layers", "6", "--micro-batch-tokens", "8192"),
        2.5,
        (*_LEARNER, "--shape", "7b", "--tiny", "--layers", "1", "--sequences", "2", "--repeats", "1"),
    ),
    Part(
        "plan",
        "the memory plan against measurements",
        ("benchmarks.learner_memory", "--settings", "base", "bfloat16", "recompute"),
        2,
        ("benchmarks.learner_memory", "--settings", "bfloat16"),
    ),
    Part(
        "trace",
        "where the time of one step goes",
        (*_LEARNER, "--layers", "2", "--repeats", "1", "--trace", "{out}/trace.json.gz"),
        1.5,
        (*_LEARNER, "--tiny", "--layers", "1", "--sequences", "2", "--repeats", "1", "--trace", "{out}/trace.json.gz"),
    ),
    Part(
        "study",
        "a comparison of methods, as far as the time goes",
        ("recipes.study", "gpu", "--minutes", "{minutes}", "--results", "{out}/studies"),
        6,
        ("recipes.study", "gpu", "--rehearse", "--minutes", "1", "--results", "{out}/studies"),
    ),
)


def about() -> dict[str, Any]:
    """Card, driver, versions and date, which every figure needs."""
    found: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    if nvidia_smi := shutil.which("nvidia-smi"):
        query = [nvidia_smi, "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
            found["gpus"] = answer.stdout.strip().splitlines() if answer.returncode == 0 else answer.stderr.strip()
        except subprocess.TimeoutExpired:
            found["gpus"] = "nvidia-smi did not answer within a minute"
    import torch

    found["card"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found["cuda"] = torch.version.cuda
    found["python"] = platform.python_version()
    found["versions"] = {name: version for name in PACKAGES if (version := _version(name))}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    found["commit"] = commit.stdout.strip() if commit.returncode == 0 else None
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_part(part: Part, words: Sequence[str], limit_s: float, log: Path) -> dict[str, Any]:
    """Run one part for at most ``limit_s`` seconds; return its JSON lines, the end of its output and its exit."""
    command = [sys.executable, "-m", *words]
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        # A session of its own, so that none of its processes outlives the limit.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, stdin=subprocess.DEVNULL
        )
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    output = log.read_text(encoding="utf-8", errors="replace")
    state = "done" if status == 0 else "too slow" if status is None else f"failed with status {status}"
    return {
        "part": part.name,
        "question": part.question,
        "command": " ".join(["python", "-m", *words]),
        "state": state,
        "seconds": round(time.monotonic() - start, 1),
        "results": _json_lines(output),
        "output": output[-TAIL:],
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a part and the processes that it started."""
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _json_lines(output: str) -> list[Any]:
    found = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def _last_metrics(run: Path) -> list[Any]:
    """The last line of a run's metrics."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(lines[-1])] if lines else []


def day(parts: Sequence[Part], out: Path, minutes: float, *, tiny: bool) -> dict[str, Any]:
    """Run all parts in order, within the time; write and return the summary."""
    out.mkdir(parents=True, exist_ok=True)
    summary = {**about(), "minutes": minutes, "tiny": tiny, "parts": []}
    deadline = time.monotonic() + 60 * minutes
    for part in parts:
        left = (deadline - time.monotonic()) / 60
        if part.needs and importlib.util.find_spec(part.needs) is None:
            result: dict[str, Any] = {"part": part.name, "state": f"skipped: {part.needs} is not installed"}
        elif left < min(1.0, part.minutes):
            result = {"part": part.name, "state": "skipped: no time left"}
        else:
            limit = min(part.minutes, left)
            values = {"out": str(out), "minutes": f"{0.8 * limit:.1f}"}
            words = [word.format(**values) for word in (part.tiny if tiny else part.words)]
            print(f"[{part.name}] {part.question} (at most {limit:.1f} min, {left:.1f} left)", flush=True)
            result = run_part(part, words, 60 * limit, out / f"{part.name}.log")
            if part.name == "quickstart":
                result["results"] = _last_metrics(out / "quickstart")
            (out / f"{part.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(
            f"[{part.name}] {result['state']}" + (f", {result['seconds']} s" if "seconds" in result else ""), flush=True
        )
        summary["parts"].append({key: result[key] for key in ("part", "state", "seconds", "results") if key in result})
        (out / "day.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=25.0, help="for everything; what does not fit is skipped")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts, in their order")
    parser.add_argument("--skip", nargs="+", choices=[part.name for part in PARTS], default=[])
    parser.add_argument("--out", type=Path, help="directory of results; default runs/gpu_day_CARD_DATE")
    args = parser.parse_args(argv)
    import torch

    tiny = not torch.cuda.is_available()
    card = re.sub(r"\W+", "_", "cpu" if tiny else torch.cuda.get_device_name()).lower()
    out = (args.out or ROOT / "runs" / f"gpu_day_{card}_{datetime.date.today():%Y-%m-%d}").absolute()
    parts = [part for part in PARTS if part.name not in args.skip and (args.only is None or part.name in args.only)]
    summary = day(parts, out, args.minutes, tiny=tiny)
    print(f"results in {out}")
    return int(any(part["state"].startswith(("failed", "too slow")) for part in summary["parts"]))


if __name__ == "__main__":
    sys.exit(main())
