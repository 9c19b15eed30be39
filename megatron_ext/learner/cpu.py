"""Patches that let Megatron-Core run unmodified on a CPU with gloo.

Megatron-Core depends on CUDA in three ways, and each has one patch here:

* it calls ``torch.cuda`` for the current device, streams and random states: CPU functions replace these;
* it allocates with ``device="cuda"``: a ``TorchFunctionMode`` rewrites that argument;
* its optimizers recognise tensors by the string ``Tensor.type()``: the same mode returns ``torch.cuda.FloatTensor``,
  also for float64, so that the float64 reference runs of the tests use the same optimizers.

A fourth patch saves time: all gloo groups of a process share one network thread. gloo starts one for each group and
wakes it 100 times a second, and Megatron makes dozens of groups, so idle groups took 2 % of a core for each process.

Nothing here is imported when a GPU is used. Call :func:`enable` before ``megatron.core`` is imported anywhere.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode

_CUDA_NAME = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float64: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


class _Stream:
    """A stream that does nothing: operations on a CPU are ordered."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, _other: Any) -> None: ...
    def wait_event(self, _event: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()  # the expert dispatcher waits for the returned event


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class CudaOnCpu(TorchFunctionMode):
    """In this mode ``device="cuda"`` means the CPU and ``Tensor.type()`` returns CUDA type names."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_NAME.get(args[0].dtype) or func(*args)
        if func is torch.Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):  # YaRN under context parallelism
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


_enabled = False


def enable() -> None:
    """Replace the parts of ``torch.cuda`` that Megatron-Core calls. Idempotent, process-wide; an error with a GPU."""
    global _enabled
    if _enabled:
        return
    if torch.cuda.is_available():
        raise RuntimeError("megatron_ext.learner.cpu.enable() was called on a machine with a GPU")
    for package in ("transformer_engine", "apex"):  # installed on a GPU machine whose GPUs are hidden
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # importing it fails from here on
    _import_megatron_without_compile()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.device_count = lambda: 1
    for name in ("set_device", "synchronize", "manual_seed", "manual_seed_all", "empty_cache"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.random.get_rng_state, cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state
    cuda.Stream = _Stream
    cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: None
    cuda.FloatTensor = lambda data: torch.tensor(data, dtype=torch.float32)
    _enabled = True
    _patch_rng_tracker()
    _patch_experts()
    _share_gloo_device()


def _import_megatron_without_compile() -> None:
    """Import Megatron-Core with ``torch.compile`` as the identity, and without TensorBoard.

    Megatron decorates helpers with it at import. Compilation on a CPU needs a C++ compiler, and the decorator alone
    imports torch._dynamo, which takes seconds at every start. TensorBoard, which takes half a second, is imported for
    the type of a timer's argument.
    """
    compile_, torch_ = torch.compile, cast(Any, torch)
    blocked = "torch.utils.tensorboard"
    unseen = blocked not in sys.modules
    if unseen:
        sys.modules[blocked] = None  # type: ignore[assignment]  # importing it fails, as where it is not installed
    torch_.compile = lambda function=None, **_: function if function is not None else (lambda f: f)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Apex is not installed", "Transformer Engine is not installed"
            import megatron.core.models.gpt.gpt_layer_specs
            import megatron.core.optimizer
            import megatron.core.pipeline_parallel
            import megatron.core.tensor_parallel.random  # noqa: F401
    finally:
        torch_.compile = compile_
        if unseen:
            del sys.modules[blocked]


def _share_gloo_device() -> None:
    from torch.distributed import distributed_c10d as c10d

    gloo: Any = c10d.ProcessGroupGloo
    devices: dict[tuple[int, str], list[Any]] = {}  # by process, since threads do not survive a fork, and interfaces

    class SharedDevice(gloo):
        """A group with the constructor that torch calls, on devices that all groups share."""

        def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
            interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
            key = os.getpid(), interfaces
            if key not in devices:
                devices[key] = (
                    [gloo.create_device(interface=name) for name in interfaces.split(",")]
                    if interfaces
                    else [gloo.create_default_device()]
                )
            options = gloo._Options()
            options._devices, options._timeout, options._threads = devices[key], timeout, 2 * len(devices[key])
            super().__init__(store, rank, size, options)

    cast(Any, c10d).ProcessGroupGloo = SharedDevice


def _patch_rng_tracker() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    rng: Any = megatron_random
    rng._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _patch_experts() -> None:
    """Two gaps of Megatron-Core 0.16's mixture of experts without Transformer Engine."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    utils: Any = moe_utils
    if not hasattr(utils, "te_general_gemm"):
        utils.te_general_gemm = None  # Megatron tests whether this is None, but defines it only with Transformer Engine
    move = utils.maybe_move_tensor_to_cpu

    def move_and_convert(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """Megatron's function converts only GPU tensors, but its all-to-all needs numbers, not tensors."""
        if as_numpy and isinstance(tensor, torch.Tensor):
            return tensor.numpy()
        return move(tensor, as_numpy, record_stream)

    cast(Any, token_dispatcher).maybe_move_tensor_to_cpu = move_and_convert
