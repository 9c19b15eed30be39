"""Learner and rollout servers take turns on the same GPUs (``rollout.colocated``).

    TRAINING   the learner has the memory; the servers sleep, without weights and KV cache
    HANDOVER   optimizer state and gradients are on the host; servers hold memory for weights and receive them
    ROLLOUT    the learner's weights are on the host too; servers hold weights and KV cache, and generate
    BROKEN     a turn failed: the run must end, and continues from its last checkpoint

Sleep is vLLM's level 2, which discards the weights, so they are sent at every turn, even if unchanged. On a CPU, where
vLLM's sleep frees nothing, the same calls are made in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Protocol

from megatron_ext.learner import control


class Model(Protocol):
    """The interface of `learner.Trainable` that is used here."""

    def offload(self, *, weights: bool = False) -> None: ...
    def reload(self, *, optimizer: bool | None = None) -> None: ...


class Sleeper(Protocol):
    """Interface of a rollout engine that shares GPUs with the learner."""

    def sleep(self) -> None: ...  # no request runs; memory of weights and KV cache is given back
    def wake(self, tag: str) -> None: ...  # "weights", then "kv_cache": memory is taken, contents are undefined


class Phase(Enum):
    TRAINING = "training"
    HANDOVER = "handover"
    ROLLOUT = "rollout"
    BROKEN = "broken"


_NEXT = {
    Phase.TRAINING: Phase.HANDOVER,
    Phase.HANDOVER: Phase.ROLLOUT,
    Phase.ROLLOUT: Phase.TRAINING,
}


class Turns:
    """The turns of learner and servers. Every rank makes every call; only rank 0 has an engine.

    Args:
        models: the policy first; a critic follows it.
        engine: starts the servers at its first call, and returns the same engine every time; None on other ranks.
    """

    def __init__(self, models: Sequence[Model], engine: Callable[[], Sleeper] | None) -> None:
        self.phase = Phase.TRAINING
        self._models, self._engine = models, engine
        self._started = False

    @contextlib.contextmanager
    def rollout(self, push: Callable[[], None]) -> Iterator[None]:
        """The servers' turn. ``push``, a collective, sends them the policy's weights.

        Raises RuntimeError if it is already their turn, or an earlier turn failed. An error inside ends the turns,
        because the state of the servers' memory is then unknown.
        """
        self._advance(Phase.HANDOVER)
        try:
            self._hand_over(push)
            self._advance(Phase.ROLLOUT)
            yield
            self._take_back()
            self._advance(Phase.TRAINING)
        except BaseException:
            self.phase = Phase.BROKEN
            raise

    def _hand_over(self, push: Callable[[], None]) -> None:
        policy, *others = self._models
        for model in others:
            model.offload(weights=True)
        policy.offload(weights=not self._started)
        _wait_for_all()
        if not self._started:
            if self._engine is not None:
                self._engine().sleep()  # a server takes all its memory when it starts
            self._started = True
            _wait_for_all()
            policy.reload(optimizer=False)
        if self._engine is not None:
            self._engine().wake("weights")
        push()
        policy.offload(weights=True)
        _wait_for_all()
        if self._engine is not None:
            self._engine().wake("kv_cache")

    def _take_back(self) -> None:
        if self._engine is not None:
            self._engine().sleep()
        _wait_for_all()
        for model in self._models:
            model.reload()

    def _advance(self, phase: Phase) -> None:
        if _NEXT.get(self.phase) is not phase:
            raise RuntimeError(f"colocated mode cannot go from {self.phase.value} to {phase.value}")
        self.phase = phase


def _wait_for_all() -> None:
    """Wait until every rank, or the servers, have freed their memory."""
    control.barrier()
