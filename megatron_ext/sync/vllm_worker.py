"""What runs inside a vLLM worker: receive weights from files, verify everything, then change the model.

Given to the server as ``--worker-extension-cls megatron_ext.sync.vllm_worker.WorkerExtension`` and
``--weight-transfer-config '{"backend": "gppo_disk"}'``; importing this module registers the backend.

vLLM calls start -> update -> finish. Nothing is touched before checksum, names and shapes are verified, so a refused
update leaves the old weights whole.
"""

from __future__ import annotations

import ctypes
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_ext.sync.base import WeightDigest

BACKEND = "gppo_disk"
LM_HEAD = "lm_head.weight"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class DiskInitInfo(WeightTransferInitInfo):
    """Files need no rendezvous."""


@dataclass
class DiskUpdateInfo(WeightTransferUpdateInfo):
    """One complete update, as `sync.disk` describes it."""

    directory: str
    version: int
    checksum: str
    files: list[str] = field(default_factory=list)


class DiskTransferEngine(WeightTransferEngine[DiskInitInfo, DiskUpdateInfo]):
    """vLLM weight-transfer backend. ``loaded``: (version, checksum) of what the model holds, None if unknown."""

    init_info_cls = DiskInitInfo
    update_info_cls = DiskUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loaded: tuple[int, str] | None = None
        self._shapes = checkpoint_shapes(Path(self.model_config.model))  # now: the directory may be gone later
        die_with_parent()

    def init_transfer_engine(self, init_info: DiskInitInfo) -> None: ...

    def start_weight_update(self) -> None:
        """Nothing yet: vLLM's own engines put the model on the meta device here, which a refused update would leave."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Overrides the base because that one synchronises an accelerator, which a CPU build does not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: DiskUpdateInfo) -> None:
        """Raises ValueError, with the model untouched, when the update is not exactly what was announced."""
        weights = read_verified(update_info)
        tied = bool(getattr(self.model_config.hf_text_config, "tie_word_embeddings", False))
        check_complete(weights, self._shapes, tied=tied)
        if tied:
            weights.pop(LM_HEAD, None)
        self.loaded = None  # from here to the last line the model is in between
        initialize_layerwise_reload(self.model)
        self.model.load_weights(list(weights.items()))
        finalize_layerwise_reload(self.model, self.model_config)
        if tied:
            refresh_tied_head(self.model)
        self.loaded = (update_info.version, update_info.checksum)

    def finish_weight_update(self) -> None:
        if self.loaded is None:
            raise RuntimeError("finish_weight_update without a complete update: send the weights first")

    def shutdown(self) -> None: ...


def read_verified(info: DiskUpdateInfo) -> dict[str, Tensor]:
    """All tensors of an update. ValueError if their checksum is not the announced one."""
    weights: dict[str, Tensor] = {}
    digest = WeightDigest()
    for name in info.files:
        for key, tensor in load_file(Path(info.directory) / name).items():
            digest.add(key, tensor)
            weights[key] = tensor
    found = digest.hexdigest()
    if found != info.checksum:
        raise ValueError(
            f"weight update to version {info.version} refused: checksum {found[:12]} of {len(weights)} tensors, "
            f"announced {info.checksum[:12]}; send the update again"
        )
    return weights


def checkpoint_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the safetensors files the server was started from."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    if not shapes:
        raise ValueError(f"{directory} holds no .safetensors file: start the server from a safetensors checkpoint")
    return shapes


def check_complete(weights: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    """ValueError unless names and shapes are those of the checkpoint; a tied output head may be there or not."""
    optional = {LM_HEAD} if tied else set()
    missing = sorted(shapes.keys() - weights.keys() - optional)
    unknown = sorted(weights.keys() - shapes.keys() - optional)
    if missing or unknown:
        raise ValueError(
            f"weight update refused: {len(missing)} tensors missing {missing[:3]}, {len(unknown)} unknown "
            f"{unknown[:3]}; send exactly the names of the checkpoint"
        )
    for name, shape in shapes.items():
        if name in weights and tuple(weights[name].shape) != shape:
            raise ValueError(f"weight update refused: {name} has shape {tuple(weights[name].shape)}, expected {shape}")


def refresh_tied_head(model: nn.Module) -> None:
    """Rebuild the packed copy of a tied output head.

    vLLM's CPU kernels hold a packed copy of every weight. A layerwise reload rebuilds it only for layers that a tensor
    was loaded into; a tied head gets none and would go on computing with the old embedding.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and getattr(head, "quant_method", None) is not None:
        head.quant_method.process_weights_after_loading(head)


class WorkerExtension:
    """Methods the server offers through ``/collective_rpc``."""

    weight_transfer_engine: DiskTransferEngine

    def loaded_weights(self) -> dict[str, Any]:
        """Version and checksum of the weights in the model; both None before the first update or after a failed one."""
        version, checksum = self.weight_transfer_engine.loaded or (None, None)
        return {"version": version, "checksum": checksum}


def die_with_parent() -> None:
    """Linux: get SIGKILL when the process that started this one dies, however it dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


WeightTransferEngineFactory.register_engine(BACKEND, DiskTransferEngine)
