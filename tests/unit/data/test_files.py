"""Common data files: formats, schemas, and one sentence for every error."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ext.rl.types import Problem
from recipes.data.files import EVAL_SPLITS, rows
from recipes.data.schemas import last_box, to_problem
from recipes.data.sources import read_problems

ROWS = [{"id": f"p{i}", "problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(5)]
PROBLEMS = [Problem(row["id"], row["problem"], row["answer"]) for row in ROWS]


def arrow_stream(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def lines(path: Path, data: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")


def test_every_format_gives_the_same_problems(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "crlf.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=2))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    arrow_stream(tmp_path / "stream.arrow", table)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for path in sorted(tmp_path.iterdir()):
        assert read_problems(path) == PROBLEMS, path.name


def test_directories_of_datasets(tmp_path: Path) -> None:
    train, test = pa.Table.from_pylist(ROWS[:3]), pa.Table.from_pylist(ROWS[3:])
    saved = tmp_path / "saved"  # datasets.DatasetDict.save_to_disk
    for name, table in (("train", train), ("test", test)):
        (saved / name).mkdir(parents=True)
        arrow_stream(saved / name / "data-00000-of-00001.arrow", table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (saved / name / "state.json").write_text(json.dumps(state))
        (saved / name / "dataset_info.json").write_text("{}")
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    hub = tmp_path / "hub"  # a copy of a repository of the hub
    (hub / "data").mkdir(parents=True)
    (hub / "README.md").write_text("---\n---\n")
    pq.write_table(train.slice(0, 2), hub / "data" / "train-00000-of-00002.parquet")
    pq.write_table(train.slice(2), hub / "data" / "train-00001-of-00002-0123456789abcdef.parquet")
    pq.write_table(test, hub / "data" / "test-00000-of-00001.parquet")
    for directory in (saved, hub):
        assert read_problems(directory) == PROBLEMS[:3]
        assert read_problems(directory, splits=EVAL_SPLITS) == PROBLEMS[3:]
    assert read_problems(saved / "test") == PROBLEMS[3:]
    shards = tmp_path / "shards"
    shards.mkdir()
    lines(shards / "b.jsonl", ROWS[2:])
    lines(shards / "a.jsonl", ROWS[:2])
    assert read_problems(shards) == PROBLEMS
    with pytest.raises(ValueError, match="has the splits test, train, but no extra"):
        list(rows(hub, ("extra",)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no data files"):
        list(rows(tmp_path / "empty"))


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 1 + 1?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


@pytest.mark.parametrize(
    ("row", "text", "answer"),
    [
        ({"question": "q", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}, "q", "42"),  # GSM8K
        ({"problem": "p", "solution": r"so \boxed{\frac{1}{2}}.", "level": "Level 1"}, "p", r"\frac{1}{2}"),  # MATH
        ({"problem": "p", "answer": "-\\frac{2}{3}", "solution": "long"}, "p", "-\\frac{2}{3}"),  # DeepScaleR
        (  # DAPO-Math-17k, in verl's columns
            {
                "data_source": "math_dapo",
                "prompt": [{"content": DAPO, "role": "user"}],
                "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": "9a9b6eb4"},
            },
            "What is 1 + 1?",
            "2",
        ),
        (  # Klear's MathSub-30K and other verl data; a system message is left to the template
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
                "reward_model": '{"ground_truth": 3.0}',
            },
            "u",
            "3",
        ),
        ({"problem": "p", "final_answer": ["1", "2"]}, "p", "1, 2"),  # OlympiadBench
        ({"problem": "p", "answer": 12345678901234567890}, "p", "12345678901234567890"),
        ({"problem": "p", "answer": 0.5}, "p", "0.5"),
        ({"problem": "p", "answer": 0}, "p", "0"),
    ],
)
def test_schemas(row: dict[str, Any], text: str, answer: str) -> None:
    problem = to_problem(row, where="here", default_id="x")
    assert (problem.id, problem.prompt, problem.answer) == ("x", text, answer)


GOOD = json.dumps(ROWS[0]).encode()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b'{"problem": "a", "answer": "\xe9"}', r"line 2: byte \d+ is not UTF-8 \(0xe9\)"),
        (b'{"problem": "a", "answer": NaN}', "line 2: NaN is not a JSON number; write the answer as text"),
        (b'{"problem": "a", "answer": -Infinity}', "line 2: -Infinity is not a JSON number"),
        (b'{"problem": "a", "answer": ' + b"9" * 5000 + b"}", "line 2: Exceeds the limit .*; write the answer as text"),
        (b'{"problem": "a", "answer": ' + b"[" * 5000 + b"]" * 5000 + b"}", "line 2: nested too deeply"),
        (b'{"problem": "a", "answer": ' + b"[" * 500 + b"]" * 500 + b"}", "line 2: nested too deeply"),
        (b'{"problem": "a", "answer": {"value": 1}}', "line 2: answer is missing or empty; .*, not dict"),
        (b'{"problem": "a", "answer": []}', "line 2: answer is missing or empty"),
        (b'{"problem": "\\ud800", "answer": "1"}', "line 2: problem has half of a surrogate pair"),
        (b'{"prompt": [{"role": "assistant", "content": "a"}], "answer": "1"}', "line 2: prompt has a message of 'ass"),
        (b'{"prompt": ["a"], "answer": "1"}', "line 2: prompt must be text, or messages"),
        (b'{"prompt": [], "answer": "1"}', "line 2: prompt has 0 messages of the user"),
        (b'{"problem": "a", "solution": "no box"}', "line 2: no answer, and no .*in its solution"),
        (b'{"problem": "a", "reward_model": "x"}', "line 2: reward_model is text, but not JSON"),
        (b'{"problem": "a", "answer": "1", "id": [1]}', "line 2: id must be text or a whole number"),
        (b'{"problem": 5, "answer": "1"}', "line 2: problem is missing or empty"),
        (b'{"problem": "a", "answer": "1"', "line 2: not JSON"),
        (b"null", "line 2: a JSON object .* is needed, not NoneType"),
        (b"\x00\x00\x00", "line 2: not JSON"),
    ],
)
def test_broken_lines_are_one_sentence_with_file_and_line(tmp_path: Path, second: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b"\r\n" + second + b"\n" + GOOD + b"\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_problems(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_broken_tables_and_unknown_formats(tmp_path: Path) -> None:
    table = pa.table({"problem": ["a", "b"], "answer": [1.0, float("nan")]})
    pq.write_table(table, tmp_path / "nan.parquet")
    with pytest.raises(ValueError, match="nan.parquet, row 2: answer is nan"):
        read_problems(tmp_path / "nan.parquet")
    whole = (tmp_path / "nan.parquet").read_bytes()
    for name, data in (("cut.parquet", whole[:-40]), ("empty.parquet", b""), ("x.arrow", b"ARROW1 nonsense")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: not a readable") as caught:
            read_problems(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "data.csv").write_text("problem,answer\n")
    with pytest.raises(ValueError, match=r"the format \.csv is not supported"):
        read_problems(tmp_path / "data.csv")


def test_last_box() -> None:
    assert last_box(r"\boxed{1} or \boxed{\{2\}}") == r"\{2\}"
    assert last_box(r"\boxed{1} \boxed{2") is None and last_box("none") is None
