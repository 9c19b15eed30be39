"""The rollout journal: exact records, torn ends, damaged middles, copies into a replay's journal, the old format."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from megatron_ext.rl.types import Problem, Rollout, Sample
from recipes.journal import main
from recipes.loop import journal
from recipes.loop.journal import FRAME_BYTES, Journal, Record, as_list, encode, frame


def record(step: int, kind: str = "rollouts", **extra: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, **extra}


def fill(path: Path, *given: dict[str, Any]) -> list[bytes]:
    """Fill a journal; return the file's contents, record by record."""
    target = Journal(path)
    payloads = [target.put(r) for r in given]
    target.close()
    return [frame(payload) + payload for payload in payloads]


def test_records_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    whole = fill(path, record(0, "eval", metrics={"x": 0.1 + 0.2}), record(0, text="a\nb é"), record(1))
    again = Journal(path)
    assert Record(again.copy("rollouts", 0)).about == record(0, text="a\nb é")
    assert Record(again.copy("eval", 0)).about["metrics"] == {"x": 0.30000000000000004}
    assert again.has("eval", 0) and again.has("rollouts", 1)
    assert not again.has("eval", 1) and not again.has("rollouts", 2)
    payload = again.put(record(2))
    again.close()
    assert path.read_bytes() == b"".join(whole) + frame(payload) + payload
    assert load(payload) == {}, "each record is a safetensors file"


@pytest.mark.parametrize("kept", [1, 7, FRAME_BYTES, FRAME_BYTES + 20, -1])
def test_a_torn_end_is_cut(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "journal.bin"
    first, second = fill(path, record(0), record(1))
    path.write_bytes(first + second[:kept])
    target = Journal(path)
    assert target.has("rollouts", 0) and not target.has("rollouts", 1)
    target.put(record(1))
    target.close()
    assert path.read_bytes() == first + second


def test_an_end_that_was_not_all_written_is_cut(tmp_path: Path) -> None:
    """After a power failure a file may have its full length, but zeros in its last blocks."""
    path = tmp_path / "journal.bin"
    first, second = fill(path, record(0), record(1))
    path.write_bytes(first + second[:-30] + bytes(30))
    target = Journal(path)
    assert target.has("rollouts", 0) and not target.has("rollouts", 1)
    target.close()
    assert path.read_bytes() == first


@pytest.mark.parametrize("middle", [b"{nonsense}\n" * 9, bytes(100), frame(bytes(50)) + bytes(50)])
def test_a_broken_middle_is_refused(tmp_path: Path, middle: bytes) -> None:
    path = tmp_path / "journal.bin"
    first, second = fill(path, record(0), record(1))
    for content in (first + middle + second, b"not a journal"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="journal.bin, byte [0-9]+: not a journal record; restore the file"):
            Journal(path)
        assert path.read_bytes() == content, "nothing is cut from a file that is not understood"


def test_a_flipped_byte_is_found_when_the_record_is_used(tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    first, second = fill(path, record(0, text="abc"), record(1))
    damaged = bytearray(first + second)
    damaged[first.index(b"abc")] ^= 1
    path.write_bytes(damaged)
    target = Journal(path)
    target.copy("rollouts", 1)
    with pytest.raises(ValueError, match="a damaged journal record; restore the file"):
        target.copy("rollouts", 0)
    target.close()


def test_a_replay_copies_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    source, target = tmp_path / "a" / "journal.bin", tmp_path / "target.bin"
    first, second = fill(source, record(0), record(1))
    source.write_bytes(first + second + second[:20])
    replay = Journal(target, source)
    assert frame(replay.copy("rollouts", 0)) == first[:FRAME_BYTES]
    replay.close()
    assert target.read_bytes() == first
    assert source.read_bytes() == first + second + second[:20], "a source is only read"


def test_an_interrupted_replay_keeps_its_journal(tmp_path: Path) -> None:
    source, target = tmp_path / "source.bin", tmp_path / "target.bin"
    whole = fill(source, record(0), record(1), record(2))
    target.write_bytes(whole[0] + whole[1] + whole[2][:7])
    replay = Journal(target, source)
    for step in (1, 2):
        assert frame(replay.copy("rollouts", step)) == whole[step][:FRAME_BYTES]
    replay.close()
    assert target.read_bytes() == source.read_bytes()


def test_two_journals_are_not_mixed(tmp_path: Path) -> None:
    source, target = tmp_path / "source.bin", tmp_path / "target.bin"
    fill(source, record(0, position=4))
    fill(target, record(0, position=8))
    replay = Journal(target, source)
    with pytest.raises(ValueError, match="target.bin holds other rollouts of step 1 .* set run.dir to a new directory"):
        replay.copy("rollouts", 0)
    replay.close()


# ---- samples ---------------------------------------------------------------------------------------------------------


def plain(sample: Sample) -> tuple[Any, ...]:
    r = sample.rollout
    tokens = [as_list(x) for x in (r.prompt_ids, r.response_ids, r.logprobs, r.weight_versions)]
    return (*tokens, r.finish_reason, sample.reward, sample.correct, sample.status, sample.problem_id, sample.group)


def test_samples_read_back_equal(tmp_path: Path) -> None:
    """Every float bit for bit, including special values."""
    logprobs = [-0.1, -1 / 3, -5e-324, -1.7976931348623157e308, math.log(0.7), -0.0]
    ids = list(range(6))
    samples = [
        Sample(Rollout([7, 8], ids, logprobs, [3, 3, 3, 4, 4, 4], "stop"), "p0", 0, 0, reward=0.1 + 0.2, correct=True),
        Sample(Rollout([7, 8], [5], [-2.0], [3], "length"), "p0", 0, 1, status="timeout"),
    ]
    other = [Sample(Rollout([9], [1], [-1.0], [3], "stop"), "p1", 1, 2, reward=-1.5)]
    groups = [(Problem("p0", "2 + 2", "4"), samples), (Problem("p1", "1", "1"), other)]
    fill(tmp_path / "journal.bin", record(5, groups=groups))
    (found,) = journal.records(tmp_path)
    decoded = found.samples(first_seq_id=100)
    assert [plain(s) for s in decoded] == [plain(s) for s in (*samples, *other)]
    assert [s.seq_id for s in decoded] == [100, 101, 102] and found.about["golds"] == ["4", "1"]
    assert math.copysign(1.0, float(decoded[0].rollout.logprobs[-1])) == -1.0
    assert found.oldest_version() == 3


VERSIONS = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(VERSIONS)
def test_versions_of_every_token_survive(versions: list[list[int]]) -> None:
    """Runs of versions that end within responses, at their ends, or span several; empty responses; tensors."""
    samples = [
        Sample(
            Rollout([1], torch.tensor(v, dtype=torch.int32), torch.zeros(len(v)), torch.tensor(v), "stop"), "p", 0, 0
        )
        for v in versions
    ]
    found = Record(encode(record(0, groups=[(Problem("p", "", ""), samples)])))
    assert [as_list(s.rollout.weight_versions) for s in found.samples(0)] == versions
    assert [as_list(s.rollout.response_ids) for s in found.samples(0)] == versions
    assert found.oldest_version() == min((x for v in versions for x in v), default=None)


def test_a_token_takes_eight_bytes() -> None:
    """Log-probabilities of an engine are float32 numbers, whatever type they come in; one version takes no space."""
    count = 100_000
    logprobs = (-torch.rand(count)).tolist()
    sample = Sample(Rollout([1], [5] * count, logprobs, [3] * count, "length"), "p", 0, 0)
    payload = encode(record(0, groups=[(Problem("p", "", ""), [sample])]))
    assert 8 * count < len(payload) < 8 * count + 2000
    (found,) = Record(payload).samples(0)
    assert as_list(found.rollout.logprobs) == logprobs
    assert isinstance(found.rollout.weight_versions, torch.Tensor)
    assert found.rollout.weight_versions.untyped_storage().nbytes() < 100


def test_experts_come_back_and_take_a_byte_each() -> None:
    """Also for prompts of different lengths; none are kept if one response lacks them."""
    groups: list[Any] = []
    for number, (prompt, lengths) in enumerate([([1, 2, 3], [2, 4]), ([5], [1, 3])]):
        samples = []
        for seed, n in enumerate(lengths):
            generator = torch.Generator().manual_seed(seed)
            experts = torch.randint(128, (len(prompt) + n - 1, 5, 8), generator=generator).to(torch.uint8)
            rollout = Rollout(prompt, [7] * n, [-0.5] * n, [0] * n, "stop", experts)
            samples.append(Sample(rollout, f"p{number}", number, seed))
        groups.append((Problem(f"p{number}", "", ""), samples))
    payload = encode(record(0, groups=groups))
    expected = [sample.rollout.experts for _, members in groups for sample in members]
    found = [sample.rollout.experts for sample in Record(payload).samples(0)]
    assert all(
        a is not None and a.dtype == torch.uint8 and torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )
    assert len(payload) - len(encode(record(0, groups=[]))) < 1000 + 40 * (4 + 6 + 1 + 3)
    groups[1][1][0] = Sample(Rollout([5], [7], [-0.5], [0], "stop"), "p1", 1, 0)
    assert {sample.rollout.experts for sample in Record(encode(record(0, groups=groups))).samples(0)} == {None}


def test_a_batch_without_groups() -> None:
    empty = Record(encode(record(3, groups=[])))
    assert empty.samples(0) == [] and empty.oldest_version() is None and journal.as_groups(empty) == []


# ---- the format before, and the command ------------------------------------------------------------------------------

OLD = {
    "kind": "rollouts",
    "step": 0,
    "position": 1,
    "groups": [
        {
            "problem": "p0",
            "gold": "4",
            "prompt": [7, 8],
            "responses": [
                {"ids": [1, 2], "logprobs": [-0.5, -0.1], "versions": [0, 0], "finish": "stop"}
                | {"reward": 1.0, "correct": True, "status": "ok"},
            ],
        }
    ],
}


def test_a_journal_of_json_lines_is_replayed_and_not_continued(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text(json.dumps(OLD) + '\n{"kind":"eval","step":1,"metrics":{}}\n{"torn')
    source = journal.source_file(tmp_path)
    replay = Journal(tmp_path / "new.bin", source)
    found = Record(replay.copy("rollouts", 0))
    assert journal.as_groups(found) == OLD["groups"] and found.about["position"] == 1
    assert replay.has("eval", 1)
    replay.close()
    with pytest.raises(ValueError, match="older journal.jsonl: it can be replayed"):
        Journal(tmp_path / "journal.bin")
    (tmp_path / "journal.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1: not a journal record"):
        Journal(tmp_path / "other.bin", source)


def test_the_command_shows_a_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "journal.jsonl").write_text(json.dumps(OLD) + "\n")
    assert main(["show", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == OLD
    assert main(["show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "rollouts" in shown and "1.000" in shown
    assert main(["show", str(tmp_path), "--step", "1"]) == 0
    shown = capsys.readouterr().out
    assert "p0" in shown and "reward 1, stop" in shown and "1 2" in shown
    assert main(["show", str(tmp_path / "none")]) == 2
    assert "no journal.bin there; give the directory of a run" in capsys.readouterr().err
