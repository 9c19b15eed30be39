"""An evaluation in the files of other harnesses, for tools that compare their results.

``lm_eval``: lm-evaluation-harness's ``results_*.json`` and ``samples_*.jsonl``. ``evalscope``: EvalScope's
``reports/<model>/<set>.json``. The scores are ours: avg@n as their accuracy, with the standard error over problems.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recipes.evaluation.results import SetResult

FILTER = "avg"  # lm-eval names a score "<metric>,<filter>"


def export(kind: str, out: Path, model: str, results: Sequence[SetResult]) -> None:
    """Write ``out/<kind>/``, ``kind`` being one of `EXPORTS`."""
    EXPORTS[kind](out / kind, model, results)


def _per_problem(result: SetResult) -> list[float]:
    return [sum(s["correct"] for s in row["samples"]) / len(row["samples"]) for row in result.rows]


def standard_error(values: Sequence[float]) -> float:
    """Of a mean, as lm-eval computes it: the sample standard deviation over the square root of the count."""
    n = len(values)
    mean = sum(values) / n
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0.0


def _lm_eval(out: Path, model: str, results: Sequence[SetResult]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"results": {}, "configs": {}, "versions": {}, "n-shot": {}, "n-samples": {}}
    for result in results:
        name, values, p = result.evaluated.name, _per_problem(result), result.evaluated.protocol
        document["results"][name] = {
            "alias": name,
            f"exact_match,{FILTER}": sum(values) / len(values),
            f"exact_match_stderr,{FILTER}": standard_error(values),
        }
        sampling = {"temperature": p.temperature, "top_p": p.top_p, "top_k": p.top_k, "max_gen_toks": p.max_tokens}
        document["configs"][name] = {
            "task": name,
            "doc_to_text": p.template,
            "repeats": p.n,
            "num_fewshot": 0,
            "output_type": "generate_until",
            "generation_kwargs": {**sampling, "do_sample": p.temperature > 0},
        }
        document["versions"][name], document["n-shot"][name] = 1, 0
        document["n-samples"][name] = {"original": result.evaluated.total, "effective": len(result.rows)}
        with (out / f"samples_{name}.jsonl").open("w", encoding="utf-8") as file:
            for row, value in zip(result.rows, values, strict=True):
                sample = {
                    "doc_id": row["position"],
                    "doc": {"id": row["id"], "problem": row["problem"], "answer": row["gold"]},
                    "target": row["gold"],
                    "arguments": {"gen_args_0": {"arg_0": row["problem"]}},
                    "resps": [[s["text"] for s in row["samples"]]],
                    "filtered_resps": [s["answer"] for s in row["samples"]],
                    "filter": FILTER,
                    "metrics": ["exact_match"],
                    "exact_match": value,
                }
                file.write(json.dumps(sample) + "\n")
    document |= {"config": {"model": "megatron-gppo", "model_args": f"pretrained={model}"}, "model_name": model}
    (out / "results_all.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _evalscope(out: Path, model: str, results: Sequence[SetResult]) -> None:
    folder = out / "reports" / model
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        name, metrics = result.evaluated.name, []
        for label, estimate in result.estimates.items():
            numbers = {"score": round(estimate.mean, 4), "num": len(result.rows)}
            macro = {"macro_score": numbers["score"]}
            category = {"name": ["default"], **numbers, **macro, "subsets": [{"name": "default", **numbers}]}
            metrics.append({"name": label, **numbers, **macro, "categories": [category]})
        report = {
            "name": f"{model}@{name}",
            "dataset_name": name,
            "model_name": model,
            "score": metrics[0]["score"],
            "metrics": metrics,
        }
        (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


EXPORTS: dict[str, Callable[[Path, str, Sequence[SetResult]], None]] = {"lm_eval": _lm_eval, "evalscope": _evalscope}
