"""The evaluation command on a tiny random model: evaluation, counts, resume and refusals."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_ext.rl.types import Problem
from recipes.data.evalsets import EvalSet
from recipes.data.suites import Protocol
from recipes.data.tasks import chain_problem
from recipes.evaluate import evaluation_config, main
from recipes.evaluation.export import EXPORTS, export
from recipes.evaluation.report import markdown, write_pages
from recipes.evaluation.results import SetResult, make_result
from recipes.models.prepare import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=0)


def write_problems(path: Path, count: int, *extra: dict[str, Any]) -> Path:
    problems = [chain_problem(3, index) for index in range(count)]
    rows = [{"id": f"{path.stem}-{i}", "problem": p.prompt, "answer": p.answer} for i, p in enumerate(problems)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *extra]), encoding="utf-8")
    return path


def run(tiny: Path, out: Path, *words: str) -> dict[str, Any]:
    """Run the evaluation and return results.json."""
    common = [f"model.path={tiny}", f"run.dir={out}", "rollout.engine=local", "eval.n=2", "eval.k=[1,2]"]
    assert main([*common, "rollout.max_tokens=6", *words]) == 0
    document: dict[str, Any] = json.loads((out / "results.json").read_text())
    return document


def test_every_problem_of_every_file_is_evaluated(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    long = {"id": "long", "problem": " ".join(["1"] * 200), "answer": "1"}
    first = write_problems(tmp_path / "first.jsonl", 150, long)
    second = write_problems(tmp_path / "second.jsonl", 7, {"problem": chain_problem(3, 0).prompt, "answer": "0"})
    text = second.read_text().replace('"answer": "0"', f'"answer": "{chain_problem(3, 0).answer}"')
    second.write_text(text)  # its last problem repeats the first
    document = run(tiny, tmp_path / "out", f"data.eval_path=[{first},{second}]", "rollout.max_model_len=128")
    counts = {s["set"]: s["counts"] for s in document["sets"]}
    assert counts["first"]["total"] == 151 and counts["first"]["evaluated"] == 150
    assert counts["first"]["dropped"] == {"prompt too long": 1} and counts["first"]["responses"] == 300
    assert counts["second"]["total"] == 8 and counts["second"]["evaluated"] == 7
    assert counts["second"]["dropped"] == {"repeated problem": 1}
    assert [len(s["problems"]) for s in document["sets"]] == [150, 7]
    cut = document["sets"][0]["counts"]["truncated"]
    shown = capsys.readouterr().out
    title = "first: 150 of 151 problems, 1 dropped (prompt too long: 1), 2 samples each, "
    title += f"{cut} of 300 responses truncated"
    assert title in " ".join(shown.split())
    flat = json.loads(shown.splitlines()[-1])
    assert flat["first/problems"] == 150 and set(flat) >= {"first/avg@2", "second/pass@2/low", "second/truncated"}


def test_data_path_alone_is_what_is_evaluated(tiny: Path, tmp_path: Path) -> None:
    path = write_problems(tmp_path / "some.jsonl", 9)
    document = run(tiny, tmp_path / "out", f"data.path={path}", "eval.problems=4")
    assert document["sets"][0]["counts"] | {"truncated": 0, "unanswered": 0} == {
        "total": 9,
        "evaluated": 4,
        "dropped": {},
        "left_out": 5,
        "responses": 8,
        "truncated": 0,
        "unanswered": 0,
        "not_judged": {},
    }


def test_a_killed_evaluation_continues_and_gives_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = write_problems(tmp_path / "some.jsonl", 9)
    words = [f"data.eval_path={path}", "rollout.max_num_seqs=4"]  # two problems at a time
    whole = run(tiny, tmp_path / "whole", *words)
    run(tiny, tmp_path / "out", *words)
    log = tmp_path / "out" / "completions" / "some.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 10
    log.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # killed while writing the fifth problem
    again = run(tiny, tmp_path / "out", *words)
    assert "4 problems are done already" in capsys.readouterr().out
    for document in (whole, again):
        document["sets"][0].pop("seconds")
    assert again == whole
    assert sorted(log.read_bytes().splitlines()) == sorted(line.rstrip(b"\n") for line in lines)

    monkeypatch.setattr("recipes.evaluate.Collector", None)  # with everything on disk, no engine starts
    run(tiny, tmp_path / "out", *words)
    common = [f"model.path={tiny}", f"run.dir={tmp_path / 'out'}", "rollout.engine=local", "rollout.max_tokens=6"]
    assert main([*common, *words, "eval.n=4", "eval.k=[1]"]) == 2
    assert "holds an evaluation with another n" in capsys.readouterr().err


def test_weights_that_do_not_match_the_config_are_refused(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    """transformers would fill the missing tensor with random numbers, with a warning at most."""
    broken = shutil.copytree(tiny, tmp_path / "broken")
    file = next(broken.glob("*.safetensors"))
    tensors = load_file(file)
    lost = next(name for name in tensors if "mlp" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, {"format": "pt"})
    path = write_problems(tmp_path / "some.jsonl", 2)
    assert main([f"model.path={broken}", f"data.eval_path={path}", f"run.dir={tmp_path / 'out'}"]) == 2
    assert lost in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["suite=ce_gpo"], "eval.suite=ce_gpo is unknown: choose suites"),
        (["suite=ce_gppo"], "set eval.data_dir=DIR, with aime24.jsonl"),
        (["suite=gsm8k", "eval.data_dir={tmp}"], "has no file for GSM8K, test (gsm8k): expected gsm8k_test.jsonl"),
        (["data.eval_path=[{tmp}/a.jsonl,{tmp}/a.jsonl]"], "names {tmp}/a.jsonl twice"),
        (["data.eval_path={tmp}/none.jsonl"], "data.eval_path={tmp}/none.jsonl: no such file"),
        (["data.eval_path={tmp}/a.jsonl", "eval.sets.b.n=2"], "eval.sets.b: there is no such set; this run has a"),
        (["data.eval_path={tmp}/a.jsonl", "eval.sets.a.m=2"], "eval.sets.a.m is unknown: a set's protocol has n, k"),
        (["data.eval_path={tmp}/a.jsonl", "eval.sets.a.n=0"], "eval.sets.a.n=0 must be a whole number of at least 1"),
        (["data.eval_path={tmp}/a.jsonl", "eval.top_k=-1"], "eval.top_k=-1 must be at least 0"),
        (["data.eval_path={tmp}/a.jsonl", "eval.temperature=0"], "greedy responses are all the same; set n to 1"),
        (["data.eval_path={tmp}/a.jsonl", "rollout.max_model_len=4096"], "exceeds the model's"),
        (["data.eval_path={tmp}/a.jsonl", "eval.export=[x]"], "eval.export=x is unknown: choose lm_eval, evalscope"),
        (["data.eval_path=3"], "data.eval_path=3 must be a file or a list of files"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    words: list[str], message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_problems(tmp_path / "a.jsonl", 2)
    common = [f"model.path={tiny}", f"run.dir={tmp_path / 'out'}", "rollout.engine=local"]
    assert main([*common, *(word.format(tmp=tmp_path) for word in words)]) == 2
    said = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in said and said.count("\n") == 1


HOSTILE = "</pre><script>alert(1)</script> \ud800 {{ 7*7 }} \\boxed{1}"


@pytest.fixture
def result() -> SetResult:
    sample = {"answer": "1", "correct": True, "score": 1.0, "status": "ok", "finish": "stop", "tokens": 3}
    wrong = {**sample, "answer": None, "correct": False, "finish": "length", "status": "timeout"}
    rows = [
        {
            "position": i,
            "id": f"p{i}",
            "problem": "<b>What?</b>",
            "gold": "<1>",
            "prompt_tokens": 5,
            "samples": [{**sample, "text": HOSTILE}, {**(sample if i else wrong), "text": "x" * 50}],
        }
        for i in range(2)
    ]
    problems = [Problem(row["id"], row["problem"], row["gold"]) for row in rows]
    dropped = Counter({"prompt too long": 3})
    evaluated = EvalSet("set", Protocol(n=2, k=(1, 2)), problems, 5, dropped, "set.jsonl", "a note")
    return make_result(evaluated, rows, seconds=1.0)


def test_pages_escape_everything_and_say_what_was_counted(result: SetResult, tmp_path: Path) -> None:
    index = write_pages(tmp_path, "model", [result])
    page = (tmp_path / "set.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<b>What" not in page and "{{ 7*7 }}" in page and "49" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; ? " in page, "half a surrogate pair does not end the report"
    title = "2 of 5 problems, 3 dropped (prompt too long: 3), 2 samples each, 1 of 4 responses truncated, 1 not judged"
    text = markdown("model", [result])
    assert title in page and title in index.read_text() and title in text
    assert "a note" in page and "a note" in text and "1 responses could not be judged" in text
    assert "| avg@2 | 0.750 |" in text and "mixed (1)" in page and "http" not in page.replace("http-equiv", "")


def test_equal_results_of_all_problems_come_with_an_exact_interval(result: SetResult) -> None:
    """0 of N only bounds the true value by 1 - 0.025 ** (1 / N), and the tables print this bound."""
    rows = [{**row, "samples": [{**row["samples"][0], "correct": False}] * 2} for row in result.rows]
    found = make_result(result.evaluated, rows, seconds=1.0)
    assert found.estimates["avg@2"].high == pytest.approx(1 - 0.025**0.5)
    assert "| avg@2 | 0.000 | 0.000 – 0.842 |  |" in markdown("m", [found]), "and none over seeds: all samples agree"


def test_exports_have_the_fields_that_the_harnesses_read(result: SetResult, tmp_path: Path) -> None:
    for kind in EXPORTS:
        export(kind, tmp_path, "model", [result])
    (path,) = (tmp_path / "lm_eval").glob("results_*.json")
    document = json.loads(path.read_text())
    assert document["results"]["set"]["exact_match,avg"] == 0.75
    assert document["results"]["set"]["exact_match_stderr,avg"] == pytest.approx(0.25)  # std 0.3536 over sqrt(2)
    assert document["n-samples"]["set"] == {"original": 5, "effective": 2}
    assert document["configs"]["set"]["metric_list"][0]["metric"] == "exact_match"
    (path,) = (tmp_path / "lm_eval").glob("samples_*.jsonl")
    # lm-eval finds task and time between the first and behind the last underscore (`get_file_task_name`).
    assert path.name.removeprefix("samples_").rsplit("_", 1)[0] == "set"
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert [s["exact_match"] for s in samples] == [0.5, 1.0] and samples[0]["filtered_resps"] == ["1", "[invalid]"]
    report = json.loads((tmp_path / "evalscope" / "reports" / "model" / "set.json").read_text())
    assert report["name"] == "model@set" and report["score"] == 0.75
    assert [metric["name"] for metric in report["metrics"]][:2] == ["mean_acc", "mean_acc_pass@1"]
    assert report["metrics"][0]["categories"][0]["subsets"] == [{"name": "default", "score": 0.75, "num": 2}]


def test_suites_come_with_the_papers_protocols(tiny: Path, tmp_path: Path) -> None:
    for name in ("AIME24", "aime_2025", "HMMT-202502", "MATH-500", "amc23"):
        write_problems(tmp_path / f"{name}.jsonl", 3)
    words = [f"model.path={tiny}", f"eval.data_dir={tmp_path}", "rollout.engine=local"]
    sets = {s.name: s for s in load(evaluation_config([*words, "suite=ce_gppo"]))}
    assert list(sets) == ["aime24", "aime25", "hmmt25", "math500", "amc23"]
    assert [s.protocol.n for s in sets.values()] == [32, 32, 32, 4, 32]
    assert [s.protocol.max_tokens for s in sets.values()] == [32768, 32768, 16384, 16384, 16384]
    assert sets["aime24"].note == "AIME24.jsonl has 3 problems; AIME 2024 is published with 30"
    assert all(s.counts["evaluated"] == 3 for s in sets.values()), "eval.problems does not cut suites"
    changed = load(evaluation_config([*words, "suite=[math500,aime24]", "eval.n=2", "eval.sets.aime24.n=3"]))
    assert [(s.name, s.protocol.n, s.protocol.k) for s in changed] == [("math500", 2, (1, 2)), ("aime24", 3, (1, 3))]


def load(config: Any) -> list[Any]:
    from recipes.data.evalsets import load_sets

    class Words:
        chat_template, unk_token_id = "x", None

        def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
            return messages[0]["content"]

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1] * len(text.split())}

        bos_token_id = eos_token_id = pad_token_id = None

    config.rollout.max_model_len = 1000
    return load_sets(config, Words(), None)
