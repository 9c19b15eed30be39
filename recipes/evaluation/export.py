"""Export an evaluation to the file formats of other harnesses, for tools that compare results.

``lm_eval``: lm-evaluation-harness's ``results_<time>.json`` and ``samples_<task>_<time>.jsonl``; it parses task and
time from the file names. ``evalscope``: EvalScope's ``reports/<model>/<set>.json``. The scores are ours: avg@n as
accuracy, with the standard error over problems. Tested by reading with lm-eval 0.4.13 and EvalScope 1.14.1
(docs/evaluation.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from recipes.evaluation.results import SetResult

FILTER = "avg"  # lm-eval names a score "<metric>,<filter>"
METRIC = "exact_match"
INVALID = "[invalid]"  # lm-eval's extraction filters return this if there is no answer


def export(kind: str, out: Path, model: str, results: Sequence[SetResult]) -> None:
    """Write ``out/<kind>/``. ``kind`` is a key of `EXPORTS`."""
    EXPORTS[kind](out / kind, model, results)


def _per_problem(result: SetResult) -> list[float]:
    return [sum(s["correct"] for s in row["samples"]) / len(row["samples"]) for row in result.rows]


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean, as in lm-eval: sample standard deviation / sqrt(n)."""
    n = len(values)
    mean = sum(values) / n
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0.0


def _lm_eval(out: Path, model: str, results: Sequence[SetResult]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    when = _last_completion(out.parent, results)
    sections = ("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
    document: dict[str, Any] = {section: {} for section in sections}
    for result in results:
        name, values = result.evaluated.name, _per_problem(result)
        document["results"][name] = {
            "alias": name,
            f"{METRIC},{FILTER}": sum(values) / len(values),
            f"{METRIC}_stderr,{FILTER}": standard_error(values),
        }
        document["configs"][name] = _task_config(result)
        document["group_subtasks"][name], document["higher_is_better"][name] = [], {METRIC: True}
        document["versions"][name], document["n-shot"][name] = 1, 0
        document["n-samples"][name] = {"original": result.evaluated.total, "effective": len(result.rows)}
        with (out / f"samples_{name}_{when}.jsonl").open("w", encoding="utf-8") as file:
            for row, value in zip(result.rows, values, strict=True):
                file.write(json.dumps(_lm_eval_sample(row, value)) + "\n")
    document |= {"config": {"model": "megatron-gppo", "model_args": f"pretrained={model}"}, "model_name": model}
    (out / f"results_{when}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _task_config(result: SetResult) -> dict[str, Any]:
    p = result.evaluated.protocol
    sampling = {"temperature": p.temperature, "top_p": p.top_p, "top_k": p.top_k, "max_gen_toks": p.max_tokens}
    return {
        "task": result.evaluated.name,
        "doc_to_text": p.template,
        "repeats": p.n,
        "num_fewshot": 0,
        "output_type": "generate_until",
        "generation_kwargs": {**sampling, "do_sample": p.temperature > 0},
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }


def _lm_eval_sample(row: dict[str, Any], value: float) -> dict[str, Any]:
    return {
        "doc_id": row["position"],
        "doc": {"id": row["id"], "problem": row["problem"], "answer": row["gold"]},
        "target": row["gold"],
        "arguments": {"gen_args_0": {"arg_0": row["problem"]}},
        "resps": [[s["text"] for s in row["samples"]]],
        "filtered_resps": [INVALID if s["answer"] is None else s["answer"] for s in row["samples"]],
        "filter": FILTER,
        "metrics": [METRIC],
        METRIC: value,
    }


def _last_completion(run_dir: Path, results: Sequence[SetResult]) -> str:
    """End time of the evaluation in the format of lm-eval's file names. Exporting again gives the same time."""
    logs = [run_dir / "completions" / f"{result.evaluated.name}.jsonl" for result in results]
    seconds = max((log.stat().st_mtime for log in logs if log.is_file()), default=0.0)
    return datetime.fromtimestamp(seconds).isoformat(timespec="microseconds").replace(":", "-")


def _evalscope(out: Path, model: str, results: Sequence[SetResult]) -> None:
    folder = out / "reports" / model
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        name, metrics = result.evaluated.name, []
        for label, estimate in result.estimates.items():
            numbers = {"score": round(estimate.mean, 4), "num": len(result.rows)}
            macro = {"macro_score": numbers["score"]}
            category = {"name": ["default"], **numbers, **macro, "subsets": [{"name": "default", **numbers}]}
            metrics.append({"name": _evalscope_name(label), **numbers, **macro, "categories": [category]})
        report = {
            "name": f"{model}@{name}",
            "dataset_name": name,
            "model_name": model,
            "score": metrics[0]["score"],
            "metrics": metrics,
        }
        (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _evalscope_name(label: str) -> str:
    """EvalScope's name for ``avg@n``, ``pass@k`` or ``maj@k``."""
    kind, _, k = label.partition("@")
    return {"avg": "mean_acc", "pass": f"mean_acc_pass@{k}", "maj": f"mean_acc_vote@{k}"}[kind]


EXPORTS: dict[str, Callable[[Path, str, Sequence[SetResult]], None]] = {"lm_eval": _lm_eval, "evalscope": _evalscope}
