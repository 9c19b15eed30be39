"""Evaluate a Hugging Face directory: `python -m recipes.evaluate model.path=DIR data.eval_path=FILE [key=value ...]`.

Every problem of every set is evaluated, with the engine, prompts and verifier of training. Problems that ``run.dir``
already has are not repeated: the same command continues a killed evaluation.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import conversion
from configs.schema import Config
from conversion.hf_to_megatron import check_source
from conversion.pickled import open_hf
from recipes.checks.cli import wrapped
from recipes.checks.settings import load_checked
from recipes.data.evalsets import EvalSet, load_sets, protocols
from recipes.data.sources import encode_prompt
from recipes.evaluation.export import EXPORTS, export
from recipes.evaluation.log import CompletionLog
from recipes.evaluation.report import markdown, write_pages
from recipes.evaluation.results import SetResult, make_result
from recipes.loop.collect import Collector
from recipes.loop.evaluation import Progress, answer_set
from recipes.models.locate import model_location, prepare_model
from recipes.rewards.terms import check_reward

HELP = """usage: python -m recipes.evaluate model.path=DIR data.eval_path=FILE [key=value ...]
       python -m recipes.evaluate model.path=DIR suite=NAME eval.data_dir=DIR [key=value ...]

  data.eval_path=FILE or [FILE,...]  problems and answers in any format of docs/data.md; every problem is evaluated
  suite=NAME or [NAME,...]           as a paper evaluates:
                                     {suites};
                                     or single benchmarks:
                                     {benchmarks}
  eval.n=8 eval.k=[1,8]              samples per problem; pass@k and maj@k
  eval.temperature=0.6 eval.top_p=0.95 eval.top_k=20 eval.max_tokens=4096
  eval.problems=50                   only the first so many problems of each set
  eval.sets.math500.n=4              a set's own number; also temperature, max_tokens, template, ...
  data.template='chat:{{problem}}'     how a problem becomes a prompt
  reward.name=math                   the verifier: final_answer, math, format or package.module:function
  rollout.engine=local               generate in this process, without vLLM
  run.dir=DIR                        results.json, results.md, index.html, completions/; default runs/eval-<model>
  eval.export=[lm_eval,evalscope]    also in the files of these harnesses

These keys replace a suite's settings. docs/evaluation.md compares the protocols with the papers'."""
# Keys whose value on the command line replaces that of every set's protocol.
_PROTOCOL_KEYS = {
    **{f"eval.{key}": key for key in ("n", "k", "max_tokens", "temperature", "top_p", "top_k", "problems")},
    "data.template": "template",
    "reward.name": "reward",
    "reward.params": "reward_params",
}


def main(argv: Sequence[str]) -> int:
    """Evaluate, print a table per set and one JSON line, and write the results; the exit status."""
    if {"-h", "--help"} & set(argv):
        from recipes.data.suites import BENCHMARKS, SUITES

        names = {
            "suites": wrapped(", ".join(SUITES), indent=37),
            "benchmarks": wrapped(", ".join(BENCHMARKS), indent=37),
        }
        print(HELP.format(**names))
        return 0
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        config = evaluation_config(argv)
        check_reward(config.reward, load=True)
        results = evaluate(config)
        write_results(config, results)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; give the same command again to continue", file=sys.stderr)
        return 130
    metrics: dict[str, Any] = {}
    for result in results:
        print_result(model_location(config).name, result)
        metrics |= result.metrics()
    print(json.dumps(metrics))
    return 0


def evaluation_config(argv: Sequence[str]) -> Config:
    """The configuration of an evaluation. Raises ValueError as `load_checked` does.

    ``data.path`` alone gives the problems to evaluate; no part of the file is held out. Sampling, template and verifier
    on the command line replace those of suites.
    """
    words = list(argv)
    given = {word.lstrip("+").partition("=")[0]: word.partition("=")[2] for word in words}
    given = {"eval.suite" if key == "suite" else key: value for key, value in given.items()}
    sets = {key for key in ("data.eval_path", "eval.suite") if given.get(key, "null") not in ("null", "[]")}
    if not sets and given.get("data.path", "null") != "null":
        words.append(f"data.eval_path={given['data.path']}")
        sets.add("data.eval_path")
    if sets:
        words += ["data.path=null", "data.name=chain"]  # there is no training data
    if "run.dir" not in given:
        words.append("run.dir=runs/eval-" + Path(given.get("model.path", "tiny")).name)
    if "rollout.max_model_len" not in given:
        words.append(f"rollout.max_model_len={2**30}")  # until the prompts are known
    if "eval.n" in given and "eval.k" not in given and given["eval.n"].isdecimal():
        words.append(f"eval.k=[{','.join(dict.fromkeys(('1', given['eval.n'])))}]")
    config = load_checked(words)
    chosen: dict[str, Any] = {}
    for key, field in _PROTOCOL_KEYS.items():
        section, name = key.split(".")
        if any(word == key or word.startswith(key + ".") for word in given):
            chosen[field] = getattr(getattr(config, section), name)
    if sets and "problems" not in chosen:
        chosen["problems"] = None
    config.eval.sets = {**config.eval.sets, "all": {**chosen, **config.eval.sets.get("all", {})}}
    protocols(config)  # raises if one is invalid
    if unknown := [kind for kind in config.eval.export if kind not in EXPORTS]:
        raise ValueError(f"eval.export={unknown[0]} is unknown: choose {', '.join(EXPORTS)}")
    if "rollout.max_model_len" not in given:
        config.rollout.max_model_len = 0  # what the prompts and responses need
    return config


def evaluate(config: Config) -> list[SetResult]:
    """Evaluate all sets of a configuration made by `evaluation_config`; writes into ``run.dir``."""
    model_dir, out = model_location(config), Path(config.run.dir)
    prepare_model(config, model_dir)
    check_weights(model_dir)
    sets, longest = sized_sets(config, model_dir)
    for evaluated in sets:
        print(f"{evaluated.name}: {evaluated.summary}, longest prompt {longest[evaluated.name]} tokens", flush=True)
    results = []
    collector: Collector | None = None
    try:
        for evaluated in sets:
            log = CompletionLog(out / "completions" / f"{evaluated.name}.jsonl", identity(config, evaluated, model_dir))
            begin = time.monotonic()
            if len(log.rows) < len(evaluated.problems):
                if log.rows:
                    print(f"{evaluated.name}: {len(log.rows)} problems are done already", flush=True)
                if collector is None:
                    collector = Collector(config, model_dir, out)
                    collector.serve(model_dir)
                    begin = time.monotonic()  # without the start of servers
                _complete(collector, evaluated, log)
            log.close()
            results.append(make_result(evaluated, list(log.ordered()), time.monotonic() - begin))
    finally:
        if collector is not None:
            collector.close()
    return results


def _complete(collector: Collector, evaluated: EvalSet, log: CompletionLog) -> None:
    progress = Progress(evaluated.name, len(evaluated.problems), len(log.rows), lambda line: print(line, flush=True))
    for part in answer_set(collector, evaluated, skip=lambda position: position in log.rows):
        log.add(part)
        progress.add(part)


def sized_sets(config: Config, model_dir: Path) -> tuple[list[EvalSet], dict[str, int]]:
    """The sets and the tokens of each one's longest prompt. Fills in ``rollout.max_model_len`` where it is 0.

    Where a model's positions do not hold a set's longest prompt and its ``max_tokens``, responses end at the model's
    last position; the set says so.
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    positions = int(getattr(AutoConfig.from_pretrained(model_dir), "max_position_embeddings", 0)) or 2**31
    open_ended = config.rollout.max_model_len == 0
    if open_ended:
        config.rollout.max_model_len = positions
    elif config.rollout.max_model_len > positions:
        raise ValueError(
            f"rollout.max_model_len={config.rollout.max_model_len} exceeds the model's {positions} positions"
        )
    sets = load_sets(config, tokenizer, lambda n: _heldout(config, n))
    longest = {
        s.name: max(len(encode_prompt(tokenizer, problem, s.protocol.template)) for problem in s.problems) for s in sets
    }
    needed = max(longest[s.name] + s.protocol.max_tokens for s in sets)
    for s in sets:
        if longest[s.name] + s.protocol.max_tokens > config.rollout.max_model_len:
            room = config.rollout.max_model_len - longest[s.name]
            limit = "the model has" if open_ended else "rollout.max_model_len is"
            s.note += ("; " if s.note else "") + (
                f"responses to the longest prompts end after {room} tokens, not {s.protocol.max_tokens}: "
                f"{limit} {config.rollout.max_model_len} positions"
            )
    if open_ended:
        config.rollout.max_model_len = min(positions, needed)
    return sets, longest


def _heldout(config: Config, n: int | None) -> list[Any]:
    from recipes.data.sources import make_source

    return make_source(config.data.name, path=config.data.path, seed=config.seed).heldout(n or config.eval.problems)


def check_weights(model_dir: Path) -> None:
    """Refuse weights that do not match ``config.json``, as training does. Raises ValueError.

    transformers and vLLM fill missing tensors with random numbers or skip unknown ones. Architectures that cannot be
    trained here are left to the engine.
    """
    raw = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    if isinstance(raw, dict) and (raw.get("architectures") or [None])[0] not in conversion.FAMILIES:
        return
    reader = open_hf(model_dir, allow_pickle=False)
    try:
        check_source(conversion.read_config(model_dir), reader)
    finally:
        reader.close()


def identity(config: Config, evaluated: EvalSet, model_dir: Path) -> dict[str, Any]:
    """Settings that must be equal for completions to belong to the same evaluation."""
    texts = json.dumps([[p.id, p.prompt, p.answer] for p in evaluated.problems])
    weights = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in model_dir.iterdir()
        if path.suffix in (".safetensors", ".bin", ".json")
    )
    protocol = asdict(evaluated.protocol)
    return {
        "model": hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:16],
        "problems": hashlib.sha256(texts.encode()).hexdigest()[:16],
        **{key: protocol[key] for key in ("n", "temperature", "top_p", "top_k", "max_tokens", "template")},
        "reward": [protocol["reward"], protocol["reward_params"]],
        "seed": config.seed,
        "max_model_len": config.rollout.max_model_len,
    }


def write_results(config: Config, results: Sequence[SetResult]) -> None:
    """``results.json``, ``results.md``, ``index.html`` with a page per set, and exports, in ``run.dir``."""
    out, model = Path(config.run.dir), model_location(config).name
    document = {"model": model, "seed": config.seed, "sets": [r.as_json() for r in results]}
    for name, text in (
        ("results.json", json.dumps(document, indent=1)),
        ("results.md", markdown(model, results)),
    ):
        partial = out / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)
    for kind in config.eval.export:
        export(kind, out, model, results)
    print(f"results in {out}: results.json, results.md, {write_pages(out, model, results).name}", flush=True)


def print_result(model: str, result: SetResult) -> None:
    """A table, and warnings about its numbers."""
    table = Table(title=f"{model}, {result.title}", title_justify="left")
    for column in ("metric", "mean", "95 % interval over problems", "over seeds"):
        table.add_column(column)
    for name, e in result.estimates.items():
        seeds = "" if e.seed_low is None else f"{e.seed_low:.3f} - {e.seed_high:.3f}"
        table.add_row(name, f"{e.mean:.3f}", f"{e.low:.3f} - {e.high:.3f}", seeds)
    console = Console()
    console.print(table)
    for warning in result.warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
