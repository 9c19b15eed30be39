"""Policy losses by name. To add one: a file here, a line in `LOSSES`, a YAML, a test (``docs/adding_a_loss.md``)."""

from __future__ import annotations

from typing import Any

from megatron_ext.rl import params as _params
from megatron_ext.rl.losses.archer import Archer
from megatron_ext.rl.losses.aspo import Aspo
from megatron_ext.rl.losses.bapo import Bapo
from megatron_ext.rl.losses.base import DifferentiableLoss, Loss
from megatron_ext.rl.losses.ce_gppo import CeGppo
from megatron_ext.rl.losses.cispo import Cispo
from megatron_ext.rl.losses.dcpo import Dcpo
from megatron_ext.rl.losses.dynamic_clip import DynamicClip
from megatron_ext.rl.losses.entropic import Entropic
from megatron_ext.rl.losses.entropy_shaped import EntropyShaped
from megatron_ext.rl.losses.gmpo import Gmpo
from megatron_ext.rl.losses.gspo import Gspo
from megatron_ext.rl.losses.pg import PolicyGradient
from megatron_ext.rl.losses.ppo import Ppo
from megatron_ext.rl.losses.repo_r import RepoR
from megatron_ext.rl.losses.sapo import Sapo

LOSSES: dict[str, type[Loss]] = {
    "pg": PolicyGradient,
    "ppo": Ppo,
    "ce_gppo": CeGppo,
    "cispo": Cispo,
    "gspo": Gspo,
    "sapo": Sapo,
    "dynamic_clip": DynamicClip,
    "aspo": Aspo,
    "bapo": Bapo,
    "dcpo": Dcpo,
    "gmpo": Gmpo,
    "archer": Archer,
    "entropic": Entropic,
    "entropy_shaped": EntropyShaped,
    "repo_r": RepoR,
}


def build_loss(name: str, **params: Any) -> Loss:
    """The loss ``name``, a callable ``LossInputs -> LossOutputs``; ``params`` are the fields of its dataclass.

    Raises:
        ValueError: unknown loss or parameter (with a suggestion), or a value out of range.
    """
    return _params.build("loss", LOSSES, name, params)


__all__ = ["LOSSES", "DifferentiableLoss", "Loss", "build_loss"]
