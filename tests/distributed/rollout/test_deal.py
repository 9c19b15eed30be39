"""Every rank receives only the token ids of a record that it computes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gloo
import pytest
import torch
import torch.distributed as dist

from megatron_ext.learner.step import ABSENT, _as_list, absent
from megatron_ext.rl.types import Problem, Rollout, Sample
from recipes.loop.deal import deal
from recipes.loop.journal import Group, Record, as_list, encode

pytestmark = pytest.mark.distributed
N, GROUPS = 4, 24


def payload() -> bytes:
    rng = random.Random(0)
    groups: list[Group] = []
    for group in range(GROUPS):
        prompt, members = [100 + group] * rng.randint(1, 9), []
        for index in range(N):
            length = rng.randint(1, 60)
            ids = [1000 * group + 100 * index + k for k in range(length)]
            logprobs = [-rng.random() for _ in ids]
            read = len(prompt) + length - 1
            experts = torch.tensor([[[k % 7, group], [index, 5], [1, 2]] for k in range(read)], dtype=torch.int16)
            rollout = Rollout(prompt, ids, logprobs, [group % 3] * length, "stop", experts.reshape(read, 3, 2))
            members.append(Sample(rollout, f"p{group}", group, 0, reward=rng.random(), correct=index == 0))
        groups.append((Problem(f"p{group}", "", "1"), members))
    return encode({"kind": "rollouts", "step": 3, "groups": groups, "position": 7})


def shares(fed: list[int], groups: list[int]) -> list[list[int]]:
    assert groups == [group for group in range(GROUPS) for _ in range(N)] and len(fed) == len(groups)
    return [[i for i in range(len(fed)) if i % 2 == 0 or i == 1], [i for i in range(len(fed)) if i % 2]]


def count_sends() -> list[int]:
    """Record the bytes of every later message from this rank to another."""
    sent: list[int] = []
    isend = dist.isend

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return isend(tensor, *args, **kwargs)

    dist.isend = counting
    return sent


def receive(rank: int, root: Path) -> None:
    """Four ranks in two replicas of two; a record with samples, then one without."""
    whole = payload()
    expected = Record(whole).samples(50)
    with gloo.group(rank, 4, root / "store"):
        replica = rank % 2
        sends = count_sends()
        record, tokens = deal(whole if rank == 0 else b"", shares, replica)
        assert record.about == Record(whole).about
        samples = record.samples(50, tokens)
        groups = [i // N for i in range(len(samples))]
        mine = set(shares([0] * len(groups), groups)[replica])
        for index, (found, sent) in enumerate(zip(samples, expected, strict=True)):
            assert (found.reward, found.correct, found.group, found.seq_id) == (
                *(sent.reward, sent.correct, sent.group, sent.seq_id),
            )
            assert as_list(found.rollout.logprobs) == as_list(sent.rollout.logprobs)
            assert as_list(found.rollout.weight_versions) == as_list(sent.rollout.weight_versions)
            ids = as_list(found.rollout.response_ids)
            if index in mine or rank == 0:
                assert ids == as_list(sent.rollout.response_ids)
                assert as_list(found.rollout.prompt_ids) == as_list(sent.rollout.prompt_ids)
                assert found.rollout.experts is not None and sent.rollout.experts is not None
                assert torch.equal(found.rollout.experts, sent.rollout.experts)
            else:
                assert ids == [ABSENT] * len(sent.rollout.response_ids)
        needed = sum(len(expected[i].rollout.response_ids) for i in shares([0] * len(groups), groups)[1])
        needed += sum(len(expected[N * group].rollout.prompt_ids) for group in range(GROUPS))
        routed = sum(
            e.nbytes for i in shares([0] * len(groups), groups)[1] if (e := expected[i].rollout.experts) is not None
        )
        assert sends == ([4 * needed, routed] if rank == 0 else []), "once, to one rank of the other replica"
        empty = encode({"kind": "rollouts", "step": 4, "groups": []})
        record, tokens = deal(empty if rank == 0 else b"", shares, replica)
        assert record.about["step"] == 4 and record.samples(0, tokens) == []


def test_ranks_get_the_token_ids_that_they_compute(tmp_path: Path) -> None:
    gloo.run(4, receive, tmp_path, timeout_s=90)


def test_a_pass_over_samples_of_another_rank_is_a_defect() -> None:
    assert _as_list(torch.tensor([5, 6])) == [5, 6] and _as_list(absent(0)) == [] and len(absent(7)) == 7
    with pytest.raises(AssertionError, match="was not sent"):
        _as_list(absent(3))
