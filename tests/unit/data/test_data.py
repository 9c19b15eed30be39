"""Problem sources: exactly-once order, resume by position, held-out problems, errors that name file and line."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.rl.types import Problem
from recipes.data.sources import FileSource, encode_prompt, make_source, read_problems
from recipes.models.prepare import tiny_tokenizer


def write(path: Path, *rows: Any) -> Path:
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write(lines)
    else:
        path.write_text(lines, encoding="utf-8")
    return path


def numbered(n: int) -> list[dict[str, Any]]:
    return [{"id": f"p{i}", "problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(n)]


def file_source(n: int, seed: int) -> FileSource:
    rows = [Problem(f"p{i}", f"problem {i}", "0") for i in range(n)]
    return FileSource(rows, [], seed=seed, fits=lambda problem: True, label="test")


# ------------------------------------------------------------------------------------------------------------- order


@given(n=st.integers(1, 12), seed=st.integers(0, 5), size=st.integers(1, 7))
def test_every_problem_comes_exactly_once_per_epoch(n: int, seed: int, size: int) -> None:
    source = file_source(n, seed)
    stream = [problem.id for step in range(3 * n) for problem in source.batch(step, size)]
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == sorted(f"p{i}" for i in range(n))


@given(position=st.integers(0, 60), count=st.integers(0, 30))
def test_position_alone_resumes_the_order(position: int, count: int) -> None:
    whole = file_source(10, seed=4).problems(0, 100)
    assert file_source(10, seed=4).problems(position, count) == whole[position : position + count]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    epochs = [tuple(problem.id for problem in file_source(30, 0).problems(30 * epoch, 30)) for epoch in range(3)]
    other_seed = tuple(problem.id for problem in file_source(30, 1).problems(0, 30))
    assert len({*epochs, other_seed}) == 4


@pytest.mark.parametrize("name", ["chain", "word_problems", "one_step_problems"])
def test_generated_sources(name: str) -> None:
    source = make_source(name, seed=1)
    assert source.batch(3, 8) == source.problems(24, 8) == source.problems(0, 32)[24:]
    assert source.train_size is None
    heldout = source.heldout(200)
    assert len({problem.prompt for problem in heldout}) == 200
    assert heldout == make_source(name, seed=2).heldout(200), "evaluations of different runs compare"
    assert not {problem.prompt for problem in heldout} & {problem.prompt for problem in source.problems(0, 2000)}


# ----------------------------------------------------------------------------------------------------------- held out


def test_split_of_one_file_is_disjoint_complete_and_independent_of_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", *numbered(400))
    sources = [make_source("jsonl", path=path, seed=seed) for seed in (0, 1)]
    heldout = [problem.id for problem in sources[0].heldout(400)]
    train = [problem.id for problem in sources[0].problems(0, sources[0].train_size or 0)]
    assert sorted(train + heldout) == sorted(f"p{i}" for i in range(400))
    assert 8 <= len(heldout) <= 50  # 25 expected
    assert [problem.id for problem in sources[1].heldout(400)] == heldout
    assert sources[0].heldout(3) == sources[0].heldout(400)[:3]


def test_training_problems_that_are_held_out_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = numbered(10)
    train = write(tmp_path / "train.jsonl", *rows)
    leaked = {"problem": "  what is 3 +\n1? ", "answer": "4"}  # the same up to case and spacing
    evaluated = write(tmp_path / "test.jsonl", leaked, {"problem": "new", "answer": "1"})
    source = make_source("jsonl", path=train, eval_path=evaluated)
    assert source.train_size == 9
    assert "p3" not in {problem.id for problem in source.problems(0, 9)}
    assert source.dropped == {"training problem that is also held out": 1}
    assert [problem.id for problem in source.heldout(10)] == ["test-1", "test-2"]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", *numbered(2))
    with pytest.raises(ValueError, match=r"train.jsonl has no training problem left, dropped .*: 2"):
        make_source("jsonl", path=path, eval_path=path)
    one = write(tmp_path / "one.jsonl", {"problem": "What is 0 + 1?", "answer": "1"})
    with pytest.raises(ValueError, match="set data.eval_path"):
        make_source("jsonl", path=one).heldout(1)


# ------------------------------------------------------------------------------------------------------------ reading


def test_reads_plain_and_compressed_files(tmp_path: Path) -> None:
    rows = [{"problem": "é?", "answer": 5, "level": 3}, "", {"question": "q", "answer": "6 * 7\n#### 42", "id": 9}]
    expected = [Problem("data-1", "é?", "5"), Problem("9", "q", "42")]
    assert read_problems(write(tmp_path / "data.jsonl", *rows)) == expected
    assert read_problems(write(tmp_path / "data.jsonl.gz", *rows)) == expected


def test_repeated_problems_are_kept_once_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", *numbered(40), *numbered(5))
    source = make_source("jsonl", path=path)
    assert source.dropped == {"repeated problem": 5}
    assert Counter(problem.id for problem in source.problems(0, source.train_size or 0)).most_common(1)[0][1] == 1


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ("{broken", "line 2: not JSON"),
        ("[1, 2]", "line 2: a JSON object with problem and answer is needed, not list"),
        ({"answer": "1"}, "line 2: problem is missing or empty"),
        ({"problem": " ", "answer": "1"}, "line 2: problem is missing or empty"),
        ({"problem": "a"}, "line 2: answer is missing or empty"),
        ({"problem": "a", "answer": True}, "line 2: answer is missing or empty"),
        ({"problem": "a", "answer": "so\n#### "}, "line 2: answer is missing or empty"),
        ({"problem": "What is 0 + 1?", "answer": "2"}, "line 2: line 1 has this problem with another answer"),
        ({"problem": "a", "answer": "1", "id": "p0"}, "line 2: id 'p0' is taken by line 1"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, second_line: Any, message: str) -> None:
    path = write(tmp_path / "data.jsonl", numbered(1)[0], second_line)
    with pytest.raises(ValueError, match=message) as caught:
        read_problems(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.jsonl does not exist: check data.path"):
        read_problems(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="has no problems"):
        read_problems(write(tmp_path / "empty.jsonl"))
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(write(tmp_path / "data.jsonl.gz", *numbered(50)).read_bytes()[:-20])
    with pytest.raises(ValueError, match="torn.jsonl.gz, after line"):
        read_problems(torn)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps({"problem": "x", "answer": "1"}).encode() + b"\n\xe9\n")
    with pytest.raises(ValueError, match="must be UTF-8"):
        read_problems(latin)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jsonl", {}, "set data.path="),
        ("gsm8k", {}, "set data.path="),
        ("maths", {}, "data.name='maths' is unknown: use chain, word_problems, one_step_problems, jsonl or gsm8k"),
        ("chain", {"eval_path": "x.jsonl"}, "data.eval_path needs data.path"),
    ],
)
def test_bad_names_are_refused(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_source(name, **options)  # type: ignore[arg-type]


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the datasets package: pip install datasets"):
        make_source("owner/name")
    fake = SimpleNamespace(load_dataset=lambda name, split: [{**row, "id": i} for i, row in enumerate(numbered(40))])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert make_source("owner/name").train_size in range(30, 41)


# ----------------------------------------------------------------------------------------------------------- encoding


class ChatTokenizer:
    """Characters as tokens, and a chat template."""

    chat_template = "yes"
    unk_token_id = bos_token_id = eos_token_id = pad_token_id = None
    unk_token = None

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> str:
        assert add_generation_prompt and not tokenize
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in ("^" if add_special_tokens else "") + text]}


def decoded(template: str, prompt: str = r"\frac{1}{2}") -> str:
    return "".join(map(chr, encode_prompt(ChatTokenizer(), Problem("p", prompt, "1"), template)))


def test_templates() -> None:
    assert decoded("{problem}") == r"^\frac{1}{2}"
    assert decoded("Q: {problem}\nA:") == "^Q: \\frac{1}{2}\nA:"
    assert decoded("chat") == r"<user>\frac{1}{2}<assistant>"
    assert decoded(r"chat:{problem} Use \boxed{}.") == r"<user>\frac{1}{2} Use \boxed{}.<assistant>"
    assert decoded("{problem}", prompt="what is {problem}?") == "^what is {problem}?"


@pytest.mark.parametrize("template", ["", "problem", "{problem} {problem}", "chat:solve it"])
def test_templates_without_one_problem_are_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"data.template must contain \{problem\} exactly once"):
        decoded(template)


def test_tiny_tokenizer_encodes_the_task_and_nothing_else() -> None:
    tokenizer = tiny_tokenizer()
    problem = make_source("chain").batch(0, 1)[0]
    ids = encode_prompt(tokenizer, problem)
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    assert len(ids) == 1 + len(problem.prompt.split()) == 12
    with pytest.raises(ValueError, match="does not know every word of problem p1: data and model do not match"):
        encode_prompt(tokenizer, Problem("p1", "how many apples ?", "3"))
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        encode_prompt(tokenizer, problem, "chat")


def test_long_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = numbered(40)
    rows[7]["problem"] += " please" * 100
    path = write(tmp_path / "data.jsonl", *rows)
    source = make_source("jsonl", path=path, tokenizer=ChatTokenizer(), template="chat", max_prompt_tokens=60)
    assert source.dropped == {"prompt too long": 1}
    assert "p7" not in {problem.id for problem in [*source.problems(0, source.train_size or 0), *source.heldout(40)]}
    with pytest.raises(ValueError, match="data.max_prompt_tokens is too small for the generated task"):
        make_source("chain", tokenizer=tiny_tokenizer(), max_prompt_tokens=11)
    with pytest.raises(ValueError, match="must be positive"):
        make_source("chain", tokenizer=tiny_tokenizer(), max_prompt_tokens=0)
