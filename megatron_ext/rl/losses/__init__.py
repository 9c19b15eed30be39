"""Policy losses by name. To add one: a file here, a line in `LOSSES`, a YAML, a test (``docs/adding_a_loss.md``)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from megatron_ext.rl import params as _params
from megatron_ext.rl.losses.base import Loss, SegmentSum
from megatron_ext.rl.losses.ce_gppo import CeGppo
from megatron_ext.rl.losses.cispo import Cispo
from megatron_ext.rl.losses.dynamic_clip import DynamicClip
from megatron_ext.rl.losses.gspo import Gspo
from megatron_ext.rl.losses.pg import PolicyGradient
from megatron_ext.rl.losses.ppo import Ppo
from megatron_ext.rl.losses.sapo import Sapo

LOSSES: dict[str, type[Loss]] = {
    "pg": PolicyGradient,
    "ppo": Ppo,
    "ce_gppo": CeGppo,
    "cispo": Cispo,
    "gspo": Gspo,
    "sapo": Sapo,
    "dynamic_clip": DynamicClip,
}


def build_loss(name: str, *, segment_sum: SegmentSum | None = None, **params: Any) -> Loss:
    """The loss ``name``, a callable ``LossInputs -> LossOutputs``.

    Args:
        segment_sum: sum over a sequence, for sequence-level losses whose sequences are spread over ranks; token-level
            losses have no use for it, so it can be passed to any.
        params: the fields of the loss's dataclass.
    Raises:
        ValueError: unknown loss or parameter (with a suggestion), or a value out of range.
    """
    cls = LOSSES.get(name)
    if segment_sum is not None and cls is not None and "segment_sum" in {f.name for f in fields(cls)}:  # type: ignore[arg-type]
        params["segment_sum"] = segment_sum
    return _params.build("loss", LOSSES, name, params)


__all__ = ["LOSSES", "Loss", "SegmentSum", "build_loss"]
