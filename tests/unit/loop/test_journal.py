"""The rollout journal: exact records, torn ends, broken middles, copies into a replay's own journal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.rl.types import Problem, Rollout, Sample
from recipes.loop.journal import Journal, decode_samples, encode_group


def record(step: int, kind: str = "rollouts", **extra: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, **extra}


def fill(path: Path, *records: dict[str, Any]) -> list[bytes]:
    journal = Journal(path)
    lines = [journal.put(r) for r in records]
    journal.close()
    return lines


def test_records_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    lines = fill(path, record(0, "eval"), record(0, text="a\nb é"), record(1))
    again = Journal(path)
    assert again.copy("rollouts", 0) == lines[1] and json.loads(lines[1])["text"] == "a\nb é"
    assert again.has("eval", 0) and again.has("rollouts", 1)
    assert not again.has("eval", 1) and not again.has("rollouts", 2)
    again.put(record(2))
    again.close()
    assert path.read_bytes() == b"".join(lines) + b'{"kind":"rollouts","step":2}\n'


@pytest.mark.parametrize("lost", [1, 5, 28])
def test_a_torn_end_is_cut(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "journal.jsonl"
    first, second = fill(path, record(0), record(1))
    path.write_bytes(path.read_bytes()[:-lost])
    journal = Journal(path)
    assert journal.has("rollouts", 0) and not journal.has("rollouts", 1)
    journal.put(record(1))
    journal.close()
    assert path.read_bytes() == first + second


@pytest.mark.parametrize("line", [b"{nonsense\n", b"[]\n", b'{"kind": "rollouts"}\n', b"\n"])
def test_a_broken_middle_is_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    first, second = fill(path, record(0), record(1))
    path.write_bytes(first + line + second)
    with pytest.raises(ValueError, match="journal.jsonl, line 2: not a journal record; restore the file"):
        Journal(path)
    assert path.read_bytes() == first + line + second, "nothing is cut from a file that is not understood"


def test_a_replay_copies_byte_for_byte(tmp_path: Path) -> None:
    source, target = tmp_path / "source.jsonl", tmp_path / "target.jsonl"
    odd = b'{ "step": 0,\t"kind": "rollouts", "x": 1e-3 }\n'  # as no json.dumps of ours would write it
    source.write_bytes(odd + b'{"kind":"rollouts","step":1}\n{"kind":"rollouts","st')
    journal = Journal(target, source)
    assert journal.copy("rollouts", 0) == odd
    journal.close()
    assert target.read_bytes() == odd
    assert source.read_bytes().endswith(b'"st'), "a source is only read"


def test_an_interrupted_replay_keeps_its_journal(tmp_path: Path) -> None:
    source, target = tmp_path / "source.jsonl", tmp_path / "target.jsonl"
    lines = fill(source, record(0), record(1), record(2))
    target.write_bytes(lines[0] + lines[1] + lines[2][:7])
    journal = Journal(target, source)
    for step in (1, 2):
        assert journal.copy("rollouts", step) == lines[step]
    journal.close()
    assert target.read_bytes() == source.read_bytes()


def test_two_journals_are_not_mixed(tmp_path: Path) -> None:
    source, target = tmp_path / "source.jsonl", tmp_path / "target.jsonl"
    fill(source, record(0, position=4))
    fill(target, record(0, position=8))
    journal = Journal(target, source)
    with pytest.raises(
        ValueError, match="target.jsonl holds other rollouts of step 1 .* set run.dir to a new directory"
    ):
        journal.copy("rollouts", 0)
    journal.close()


def test_samples_read_back_equal(tmp_path: Path) -> None:
    """Every float bit for bit, the awkward ones too."""
    logprobs = [-0.1, -1 / 3, -5e-324, -1.7976931348623157e308, math.log(0.7), -0.0]
    ids = list(range(6))
    samples = [
        Sample(Rollout([7, 8], ids, logprobs, [3, 3, 3, 4, 4, 4], "stop"), "p0", 0, 0, reward=0.1 + 0.2, correct=True),
        Sample(Rollout([7, 8], [5], [-2.0], [3], "length"), "p0", 0, 1, status="timeout"),
    ]
    other = [Sample(Rollout([9], [1], [-1.0], [3], "stop"), "p1", 1, 2, reward=-1.5)]
    groups = [encode_group(Problem("p0", "2 + 2", "4"), samples), encode_group(Problem("p1", "1", "1"), other)]
    (line,) = fill(tmp_path / "journal.jsonl", record(5, groups=groups))
    decoded = decode_samples(json.loads(line), first_seq_id=100)
    assert [s.rollout for s in decoded] == [s.rollout for s in (*samples, *other)]
    assert [(s.problem_id, s.group, s.seq_id) for s in decoded] == [("p0", 0, 100), ("p0", 0, 101), ("p1", 1, 102)]
    assert [(s.reward, s.correct, s.status) for s in decoded] == [
        *((0.30000000000000004, True, "ok"), (0.0, False, "timeout"), (-1.5, False, "ok"))
    ]
    assert math.copysign(1.0, decoded[0].rollout.logprobs[-1]) == -1.0
