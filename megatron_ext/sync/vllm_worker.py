"""The code inside a vLLM worker: receive weights from files or a broadcast, verify them, change the model.

Given to the server as ``--worker-extension-cls megatron_ext.sync.vllm_worker.WorkerExtension`` and
``--weight-transfer-config '{"backend": "gppo"}'``; importing this module registers the backend (vLLM >= 0.32).

vLLM calls start -> update -> finish. Names and shapes are verified before the model changes, and for files and shared
memory the checksum too, so a refused update leaves the old weights in place. A broadcast is loaded bucket by bucket, so
that a worker never holds a second copy of the model. A wrong checksum is then found after the old weights were
overwritten, and the server reports that it has no weights (`WorkerExtension.loaded_weights`) until an update succeeds.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megatron_ext.sync.base import Clock, WeightDigest
from megatron_ext.sync.broadcast import Rendezvous, join_group
from megatron_ext.sync.buckets import Entry
from megatron_ext.sync.receive import (
    LM_HEAD,
    UPLOAD_BYTES,
    Update,
    Upload,
    check_complete,
    layer_of,
    read_shared,
    read_verified,
    receive_buckets,
    shape_of,
    verify,
)

try:
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
except ImportError as error:
    raise ImportError("weight updates need vLLM 0.32 or newer: upgrade the servers' vLLM") from error

BACKEND = "gppo"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class InitInfo(WeightTransferInitInfo, Rendezvous):
    """Where to join the learner for broadcasts; the other transports need no initialisation."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo, Update):
    """One complete update."""


class TransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """vLLM weight-transfer backend. ``loaded``: (version, checksum) of what the model holds, None if unknown."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loaded: tuple[int, str] | None = None
        self._shapes = checkpoint_shapes(Path(self.model_config.model))  # now: the directory may be gone later
        self._tied = bool(getattr(self.model_config.hf_text_config, "tie_word_embeddings", False))
        self._held: dict[str, str] = {}  # manifest of the last update by files or shared memory
        self._group: Any = None
        self._timeout_s = 0.0
        self.seconds: dict[str, float] = {}  # of the last update: "receive", "check", "load"
        die_with_parent()

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the learner's group; a group of before is left."""
        self.shutdown()
        config = self.parallel_config
        rank = init_info.rank + config.data_parallel_index * config.world_size + config.rank
        self._timeout_s = init_info.timeout_s
        self._group = join_group(init_info, rank)

    def start_weight_update(self) -> None:
        """Nothing yet: vLLM's own engines put the model on the meta device here, which a refused update would leave."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Overrides the base because that one synchronises an accelerator, which a CPU build does not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Raises ValueError when the update is not exactly what was announced; see the module for what is left then."""
        self.seconds = {}
        clock = Clock(self.seconds)
        if update_info.buckets and not update_info.socket:
            self._held = {}
            self._receive_broadcast(update_info, clock)
        else:
            held = self._held if self.loaded is not None and update_info.delta else {}
            shapes = {name: shape_of(entry) for name, entry in update_info.tensors.items()}
            check_complete(shapes, self._shapes, tied=self._tied)
            if update_info.socket:
                weights = read_shared(update_info, self.device, clock, held)
            else:
                weights = read_verified(update_info, clock, held)
            if weights:
                with self._loading(embedding=any(not layer_of(name) for name in weights)):
                    self._load(self._uploaded(weights))
            self._held = dict(update_info.tensors)
            clock.lap("load")
        self.loaded = (update_info.version, update_info.checksum)

    def _receive_broadcast(self, info: UpdateInfo, clock: Clock) -> None:
        if self._group is None:
            raise RuntimeError("weight broadcast without a group: the learner must call init first")
        entries = [[Entry(**entry) for entry in bucket] for bucket in info.buckets]
        digest = WeightDigest(info.digest)
        received = receive_buckets(self._group, entries, self.device, self._timeout_s)
        try:
            check_complete({e.name: tuple(e.shape) for part in entries for e in part}, self._shapes, tied=self._tied)
            with self._loading():
                for weights in received:
                    clock.lap("receive")
                    for name, tensor in weights.items():
                        digest.add(name, tensor)
                    clock.lap("check")
                    self._load(weights.items())
                    clock.lap("load")
            clock.lap("load")
            verify(digest, info)
            clock.lap("check")
        finally:
            for _ in received:  # the others in the group wait for us, whatever went wrong here
                pass

    @contextmanager
    def _loading(self, *, embedding: bool = True) -> Iterator[None]:
        """``embedding``: whether it is loaded, and a tied head with it."""
        self.loaded = None  # from here to the caller's last line the model is in between
        initialize_layerwise_reload(self.model)
        yield
        finalize_layerwise_reload(self.model, self.model_config)
        if self._tied and embedding:
            refresh_tied_head(self.model)

    def _uploaded(self, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of files on this worker's GPU, one after the other, where whole tensors are worth uploading.

        With more tensor-parallel ranks a worker needs a smaller part of each, which vLLM copies from the host. So it
        does with tensors that take much of the GPU's memory.
        """
        few = self.device.type == "cuda" and self.parallel_config.tensor_parallel_size <= 2
        upload = Upload(self.device) if few else None
        for name, tensor in weights.items():
            small = tensor.device.type == "cpu" and tensor.nbytes <= UPLOAD_BYTES
            yield name, upload(tensor) if upload is not None and small else tensor

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.model.load_weights((name, w) for name, w in weights if not (self._tied and name == LM_HEAD))

    def finish_weight_update(self) -> None:
        if self.loaded is None:
            raise RuntimeError("finish_weight_update without a complete update: send the weights first")

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None


def checkpoint_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the safetensors files the server was started from."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    if not shapes:
        raise ValueError(f"{directory} holds no .safetensors file: start the server from a safetensors checkpoint")
    return shapes


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

    weight_transfer_engine: TransferEngine

    def loaded_weights(self) -> dict[str, Any]:
        """Version and checksum of the weights in the model, both None before the first update or after a failed one.

        Besides, the seconds that the update took in this worker.
        """
        engine = self.weight_transfer_engine
        version, checksum = engine.loaded or (None, None)
        return {"version": version, "checksum": checksum, "seconds": engine.seconds}


def die_with_parent() -> None:
    """Linux: get SIGKILL when the process that started this one dies, however it dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


WeightTransferEngineFactory.register_engine(BACKEND, TransferEngine)
