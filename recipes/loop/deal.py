"""One record of rollouts, from rank 0 to every rank: numbers about all samples, token ids of the ones it computes.

Every rank gets lengths, rewards, verdicts, weight versions and log-probabilities of the whole batch, 4 bytes a token:
selection, mismatch weights and metrics look at all of it and need no reduction. Token ids, another 4 bytes, and experts
for routing replay (hundreds) go only to the ranks that feed them to the model. Which those are follows from the
lengths, so every rank knows what it will get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_ext.learner import control
from megatron_ext.learner.step import absent
from megatron_ext.rl.packing import fed_length
from recipes.loop.journal import Record, Tokens

Shares = Callable[[list[int], list[int]], list[list[int]]]
Part = tuple[list[int], list[int]]  # groups whose prompts a replica needs, and samples


def deal(payload: bytes, shares: Shares, replica: int) -> tuple[Record, Tokens | None]:
    """The record on every rank, and the token ids that its samples have here (None: those of the record itself).

    A collective. ``payload`` matters on rank 0 only. ``shares``: from the fed tokens and the group of each sample to
    the samples of each data-parallel replica, of which this rank belongs to ``replica``.
    """
    if torch.distributed.get_world_size() == 1:
        return Record(payload), None
    whole = Record(payload) if torch.distributed.get_rank() == 0 else None
    record = Record(control.broadcast_bytes(whole.without_tokens() if whole else b"", src=0))
    if not len(record.arrays.get("response_ends", ())):
        return (record, Tokens([], [], [])) if whole is None else (whole, None)
    prompts, responses = record.lengths()
    groups: list[int] = record.arrays["group"].tolist()
    fed = [fed_length(prompts[group], length) for group, length in zip(groups, responses, strict=True)]
    parts = [_places(share, groups) for share in shares(fed, groups)]
    sent = None if whole is None else whole.tokens()
    mine = _deal_ids(sent, record, parts, replica)
    if "experts" in record.arrays:
        _deal_experts(sent, record.arrays["experts"], mine, fed, [samples for _, samples in parts], replica)
    return (record, mine) if whole is None else (whole, None)


def _places(share: Sequence[int], groups: Sequence[int]) -> Part:
    return sorted({groups[i] for i in share}), list(share)


def _deal_ids(sent: Tokens | None, record: Record, parts: Sequence[Part], replica: int) -> Tokens:
    """Token ids here, `absent` ones for samples of others; ``sent``: all of them, on rank 0."""
    lengths = record.lengths()
    sizes = [of_kind[i] for of_kind, wanted in zip(lengths, parts[replica], strict=True) for i in wanted]
    into = torch.empty(sum(sizes), dtype=torch.int32)
    control.deal([] if sent is None else [_join(sent[:2], part) for part in parts], replica, into)
    pieces = iter(into.split(sizes))
    prompts, responses = ([absent(n) for n in of_kind] for of_kind in lengths)
    for of_kind, wanted in zip((prompts, responses), parts[replica], strict=True):
        for i in wanted:
            of_kind[i] = next(pieces)
    return Tokens(prompts, responses, [None] * len(responses))


def _join(tokens: tuple[list[Tensor], list[Tensor]], part: Part) -> Tensor:
    pieces = [of_kind[i] for of_kind, wanted in zip(tokens, part, strict=True) for i in wanted]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)


def _deal_experts(
    sent: Tokens | None, like: Tensor, mine: Tokens, fed: Sequence[int], shares: Sequence[list[int]], replica: int
) -> None:
    """Fill in ``mine.experts``, (fed tokens, layers with experts, top k) each; ``like``: their dtype and shape."""
    bytes_of = [
        torch.cat([_bytes(sent.experts[i]) for i in share] or [torch.empty(0, dtype=torch.uint8)])
        for share in (shares if sent is not None else ())
        if sent is not None
    ]
    row = like.shape[1] * like.shape[2] * like.itemsize
    sizes = [fed[i] * row for i in shares[replica]]
    into = torch.empty(sum(sizes), dtype=torch.uint8)
    control.deal(bytes_of, replica, into)
    mine.experts[:] = [like.new_zeros(1, *like.shape[1:]).expand(n, -1, -1) for n in fed]
    for i, piece in zip(shares[replica], into.split(sizes), strict=True):
        mine.experts[i] = piece.clone().view(like.dtype).reshape(fed[i], *like.shape[1:])


def _bytes(experts: Tensor | None) -> Tensor:
    assert experts is not None
    return experts.contiguous().reshape(-1).view(torch.uint8)
