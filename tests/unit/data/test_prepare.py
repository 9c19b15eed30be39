"""Preparing data: each filter, the split, determinism, and no overwriting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.data.filters import Contamination
from recipes.models.prepare import make_tiny_model
from recipes.prepare_data import main

BENCHMARK = "A train travels at sixty miles per hour for three hours and then stops for lunch"
ROWS: list[dict[str, Any]] = [
    *({"id": f"p{i}", "problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)),
    {"problem": "what  is 3 + 1?", "answer": "4"},  # repeats p3
    {"problem": "Which?", "answer": "1"},
    {"problem": "which?", "answer": "2"},  # the same text with another answer
    {"problem": f"Q: {BENCHMARK}. How far?", "answer": "180"},
    {"problem": "1 " * 60, "answer": "1"},
]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def kept(out: Path, name: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_filters_split_and_card(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = written(tmp_path / "raw.jsonl", ROWS)
    against = written(tmp_path / "bench.jsonl", [{"problem": f"{BENCHMARK}!", "answer": "180"}])
    rates = written(tmp_path / "rates.jsonl", [{"id": f"p{i}", "pass_rate": i / 40} for i in range(39)])
    words = [f"path={path}", f"against={against}", f"rates={rates}", "min_rate=0.05", "max_rate=0.9", "heldout=5"]
    assert main([*words, f"out={tmp_path / 'out'}"]) == 0
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["dropped"] == {
        "no pass rate": 2,  # p39 and the long one
        "pass rate not between 0.05 and 0.9": 6,  # p0-p2 (at 0.05 is not above), p36-p38
        "repeated problem": 1,
        "same text with different answers": 2,
        "shares 9 words with bench": 1,
    }
    assert (stats["rows"], stats["train"], stats["heldout"]) == (len(ROWS), 28, 5)
    train, heldout = kept(tmp_path / "out"), kept(tmp_path / "out", "heldout")
    assert sorted(r["id"] for r in train + heldout) == sorted(f"p{i}" for i in range(3, 36))
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "out").iterdir()), "no path leaks"
    assert "raw.jsonl, line 41" in (tmp_path / "out" / "README.md").read_text()
    assert "1 dropped: shares 9 words with bench" in capsys.readouterr().out

    assert main([*words, f"out={tmp_path / 'again'}"]) == 0
    for name in ("train.jsonl", "heldout.jsonl", "stats.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert main([*words, "seed=1", f"out={tmp_path / 'other'}"]) == 0
    assert kept(tmp_path / "other", "heldout") != heldout


def test_prompts_are_measured_with_the_template(tmp_path: Path) -> None:
    tiny = make_tiny_model(tmp_path / "tiny", seed=0)
    rows = [{"problem": " ".join(["1"] * n), "answer": "1"} for n in range(1, 21)]
    words = [f"path={written(tmp_path / 'raw.jsonl', rows)}", f"tokenizer={tiny}", "max_prompt_tokens=12"]
    assert main([*words, f"out={tmp_path / 'plain'}"]) == 0
    assert main([*words, "template={problem} 2 2 2", f"out={tmp_path / 'longer'}"]) == 0
    assert len(kept(tmp_path / "plain")) - len(kept(tmp_path / "longer")) == 3
    assert json.loads((tmp_path / "plain" / "stats.json").read_text())["prompt_tokens"]["max"] == 12


def test_rates_from_a_journal_and_from_completions(tmp_path: Path) -> None:
    path = written(tmp_path / "raw.jsonl", ROWS[:3])
    groups = [
        {"problem": f"p{i}", "responses": [{"correct": bool(c)} for c in outcome]}
        for i, outcome in enumerate(([0, 0], [1, 0], [1, 1]))
    ]
    journal = written(tmp_path / "journal.jsonl", [{"kind": "rollouts", "groups": groups}, {"kind": "eval"}])
    samples = [{"id": g["problem"], "samples": g["responses"]} for g in groups]
    completions = written(tmp_path / "completions.jsonl", [{"evaluation": {}}, *samples])
    for rates in (journal, completions):
        out = tmp_path / f"out-{rates.stem}"
        assert main([f"path={path}", f"rates={rates}", f"out={out}"]) == 0
        assert [row["id"] for row in kept(out)] == ["p1"]


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = written(tmp_path / "raw.jsonl", [*ROWS[:3], {"problem": "x"}])
    out = tmp_path / "out"
    assert main([f"path={path}", f"out={out}"]) == 2
    assert f"{path}, line 4: answer is missing" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw.jsonl"]
    assert main([f"path={path}", f"out={out}", "bad=drop"]) == 0
    (out / "mine").write_text("precious")
    assert main([f"path={path}", f"out={out}", "bad=drop"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err and (out / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out={tmp}/o"], "path is missing"),
        (["path={tmp}/raw.jsonl"], "out is missing"),
        (["path={tmp}/none", "out={tmp}/o"], "path={tmp}/none: no such file"),
        (["path={tmp}/raw.jsonl", "out={tmp}/o", "min_rate=0.5"], "no effect without rates"),
        (["path={tmp}/raw.jsonl", "out={tmp}/o", "max_prompt_tokens=5"], "tokenizer=DIR"),
        (["path={tmp}/raw.jsonl", "out={tmp}/o", "ngram=0"], "ngram=0 must be at least 1"),
        (["path={tmp}/raw.jsonl", "out={tmp}/o", "bad=maybe"], "bad=maybe must be stop or drop"),
        (["path={tmp}/raw.jsonl", "out={tmp}/o", "rats=x"], "'rats'"),
        (["path={tmp}/raw.jsonl", "out={tmp}/o", "heldout=many"], "many"),
        (["path={tmp}/raw.jsonl", "out"], "not of the form key=value"),
        (["path={tmp}/raw.jsonl", "out={tmp}/o", "heldout=99"], "no training problem is left"),
        (["path={tmp}/raw.jsonl", "out={tmp}/o", "rates={tmp}/raw.jsonl"], "line 1: no 'pass_rate' there"),
    ],
)
def test_bad_settings(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    written(tmp_path / "raw.jsonl", ROWS[:3])
    assert main([word.format(tmp=tmp_path) for word in words]) == 2
    said = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in said and said.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw.jsonl"]


def test_contamination_counts_shared_words_in_order() -> None:
    found = Contamination([("bench", "one two three four five"), ("short", "two words")], 3)
    assert found.source("Zero one, TWO three! six") == "bench"
    assert found.source("three two one four five six") is None
    assert found.source("one two three four", overlap=3) is None
    assert found.source("one two three four five", overlap=3) == "bench"
    assert found.source("Two  words.") == "short" and found.source("some two words more") is None
