"""Partial rollouts (``rollout.partial``): a batch takes the groups that are complete first, the others go on.

More groups are open than a batch holds. A long response is continued over weight updates, each token with the version
that wrote it, instead of making every step wait for it; at most ``rollout.max_staleness`` updates, after which its step
waits. Nothing that was written is thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.rl.types import Problem, Sample
from recipes.rollout.engine import Request


@dataclass(eq=False)
class Begun:
    """A group that was begun and is not trained yet."""

    position: int  # of its problem in the source: on a resume it is begun anew from there
    step: int  # at which it was begun, which is the version of its first tokens or an earlier one
    problem: Problem
    request: Request
    samples: list[Sample] | None = None  # once complete and judged


def open_groups(per_step: int, generated: int | None) -> int:
    """How many groups are open at a time: ``rollout.generated_prompts``, by default two batches."""
    return generated or 2 * per_step


def choose(begun: Sequence[Begun], step: int, *, wanted: int, age: int) -> list[Begun] | None:
    """The batch of ``step``: of the complete groups the ``wanted`` oldest. None while another must be waited for.

    The rest must still fit into later batches before it is older than ``age`` steps: of the groups that are due j steps
    from now or earlier, at most j batches may be left. With at most ``(1 + age) * wanted`` groups open, waiting long
    enough always leads to a batch.

    Args:
        begun: in the order in which they were begun.
    """
    complete = [group for group in begun if group.samples is not None]
    batch = complete[:wanted]
    if len(complete) == len(begun):
        return batch
    rest = [group for group in begun if group not in batch]
    due = [group.step + age - step for group in rest]
    late = any(sum(when <= j for when in due) > j * wanted for j in range(age + 1))
    return None if late or len(batch) < wanted else batch
