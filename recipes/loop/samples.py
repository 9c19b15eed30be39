"""The few completions of a step that ``samples.jsonl`` keeps for the report, token by token."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from megatron_ext.rl.trace import TokenTrace
from megatron_ext.rl.types import Sample, TokenStats

SAMPLES_PER_STEP = 4
TOKENS_PER_SAMPLE = 4096  # longer ones are kept without numbers per token


def kept(samples: list[Sample]) -> list[int]:
    """Which samples of a step are kept: evenly spread, whatever their rewards."""
    return list(range(0, len(samples), max(1, len(samples) // SAMPLES_PER_STEP))[:SAMPLES_PER_STEP])


def make_trace(samples: list[Sample]) -> TokenTrace:
    """An empty trace of the tokens of the kept samples that are not too long."""
    ends = _ends(samples)
    parts = [torch.arange(ends[i], ends[i + 1]) for i in kept(samples) if _short(samples[i])]
    return TokenTrace(torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long))


def rows(
    samples: list[Sample], stats: TokenStats | None, trace: TokenTrace | None, tokenizer: Any
) -> list[tuple[Sample, dict[str, Any]]]:
    """The kept samples, each with its texts and its numbers per token, for a JSON line."""
    ends = _ends(samples)
    found: list[tuple[Sample, dict[str, Any]]] = []
    for index in kept(samples):
        sample, start, end = samples[index], ends[index], ends[index + 1]
        row: dict[str, Any] = {
            "problem": sample.problem_id,
            "prompt": tokenizer.decode(sample.rollout.prompt_ids),
            "response": tokenizer.decode(sample.rollout.response_ids),
            "reward": sample.reward,
            "advantage": sample.advantage,
        }
        if stats is not None and _short(sample):
            row["tokens"] = [tokenizer.decode([token]) for token in sample.rollout.response_ids]
            row["entropy"] = [round(value, 3) for value in stats.entropy[start:end].tolist()]
            row["logp"] = [round(value, 3) for value in stats.logp[start:end].tolist()]
            row |= (trace.of(start, end) if trace is not None else None) or {}
        found.append((sample, row))
    return found


def _ends(samples: list[Sample]) -> list[int]:
    return list(accumulate((len(sample.rollout.response_ids) for sample in samples), initial=0))


def _short(sample: Sample) -> bool:
    return len(sample.rollout.response_ids) <= TOKENS_PER_SAMPLE
