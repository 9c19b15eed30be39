"""Several evaluation sets during training, each on its own schedule, and the best policy by one of them."""

from __future__ import annotations

import json
from pathlib import Path

from training import run_here

from recipes.data.tasks import chain_problem


def test_several_sets_on_their_schedules_and_the_best_policy(model: Path, tmp_path: Path) -> None:
    paths = []
    for name, first in (("often", 0), ("seldom", 50)):
        problems = [chain_problem(9, first + i) for i in range(5)]
        rows = [json.dumps({"problem": p.prompt, "answer": p.answer}) + "\n" for p in problems]
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(rows))
    train = tmp_path / "train.jsonl"
    problems = [chain_problem(1, i) for i in range(64)]
    texts = {p.prompt: p.answer for p in problems}
    train.write_text("".join(json.dumps({"problem": t, "answer": a}) + "\n" for t, a in texts.items()))
    run = run_here(
        model,
        tmp_path / "run",
        *("data.name=jsonl", f"data.path={train}", f"data.eval_path=[{paths[0]},{paths[1]}]"),
        *("eval.every=1", "eval.sets.seldom.every=3", "eval.sets.seldom.n=4", "eval.problems=4", "train.steps=3"),
        *("eval.best=often/avg@2", "train.save_every=0"),
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [sorted({k.split("/")[1] for k in line if k.startswith("val-core/")}) for line in lines]
    assert measured == [["often"], ["often"], ["often", "seldom"]]
    assert {"val-before/often/avg@2", "val-before/seldom/avg@4"} <= set(lines[0])
    assert lines[-1]["val-core/often/problems"] == 4
    best = json.loads((run / "best.json").read_text())
    values = [line["val-core/often/avg@2"] for line in lines]
    assert best == {"metric": "often/avg@2", "value": max(values), "step": values.index(max(values)) + 1}
    assert (run / "best" / "model.safetensors").is_file()
