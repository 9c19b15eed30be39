"""Storages moved to the host and back: nothing stays on the device, all views remain valid, all bits are restored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gloo
import learner_cases as cases
import pytest
import torch
from learner_cases import DP2, DP2_SHARDED, Layout
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.schema import OptimConfig, ParallelConfig
from megatron_ext.learner.offload import Parking, model_tensors, optimizer_tensors
from megatron_ext.rl.losses import build_loss

if TYPE_CHECKING:
    from megatron_ext.learner.learner import Learner

RUNS: dict[str, tuple[Layout, str]] = {
    "plain-float32": (DP2, "float32"),
    "sharded-float32": (DP2_SHARDED, "float32"),  # the optimizer's parameters are views of the weights
    "sharded-bfloat16": (DP2_SHARDED, "bfloat16"),  # and here separate float32 copies
}


def test_a_parked_storage_is_empty_and_returns_to_all_its_views() -> None:
    whole = torch.arange(12, dtype=torch.float32)
    left, right = whole[:5], whole.view(3, 4)[1:]
    kept, parking = whole.clone(), Parking()
    parking.park([left, right])
    assert whole.untyped_storage().size() == left.untyped_storage().size() == 0
    assert parking and parking.nbytes == 48, "one storage, copied once"
    parking.park([right])  # again: it is already offloaded
    parking.unpark()
    assert torch.equal(whole, kept) and not parking
    left[0] = 7.0
    assert whole[0] == 7.0 and right.data_ptr() == whole.data_ptr() + 16, "views still share the storage"
    assert left.shape == (5,) and right.stride() == (4, 1)


def test_host_memory_is_used_again_and_other_dtypes_survive() -> None:
    tensors = [torch.randn(4, dtype=dtype) for dtype in (torch.bfloat16, torch.float64)] + [torch.tensor(3)]
    kept, parking = [t.clone() for t in tensors], Parking()
    addresses = []
    for _ in range(2):
        parking.park(tensors)
        addresses.append(sorted(host.data_ptr() for _, host in parking._parked))
        parking.unpark()
    assert addresses[0] == addresses[1]
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


def test_what_the_optimizer_shares_with_the_model_is_no_state() -> None:
    """In float32 its parameters are the weights, or (distributed) views of them; master weights are its own."""
    module = torch.nn.Linear(3, 2, bias=False)
    view = module.weight.detach().view(-1)[:4].requires_grad_()
    master = torch.zeros(6, requires_grad=True)
    inner = torch.optim.AdamW([module.weight, view, master], lr=0.1)
    for parameter in (module.weight, view, master):
        parameter.grad = torch.ones_like(parameter)
    inner.step()
    optimizer = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner), SimpleNamespace(optimizer=None)])
    found = {t.untyped_storage().data_ptr() for t in optimizer_tensors(optimizer, [module])}
    assert module.weight.untyped_storage().data_ptr() not in found
    assert master.untyped_storage().data_ptr() in found
    for state in inner.state.values():
        assert {state[name].untyped_storage().data_ptr() for name in ("exp_avg", "exp_avg_sq")} <= found
    assert [t.data_ptr() for t in model_tensors([module])] == [module.weight.data_ptr()]


# --- the learner --------------------------------------------------------------------------------------------------


def _held(learner: Learner) -> dict[str, int]:
    """Bytes allocated on this rank: weights, gradient buffers, optimizer state."""

    def total(tensors: Any) -> int:
        return sum({t.untyped_storage()._cdata: t.untyped_storage().size() for t in tensors}.values())

    buffers = [b for chunk in learner.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
    return {
        "weights": total(model_tensors(learner.chunks)),
        "gradients": total(b.grad_data for b in buffers),
        "optimizer": total(optimizer_tensors(learner.optimizer, learner.chunks)),
    }


def _trained(layout: Layout, dtype: str, model_dir: Path, *, offload: bool) -> dict[str, Tensor]:
    """Train three updates; ``offload`` moves everything to the host between them, and optimizer state during them."""
    from megatron_ext.learner.learner import Learner

    config = cases.make_config(layout, dtype, OptimConfig(lr=1e-2, weight_decay=0.1, offload=offload))
    learner = Learner(config, model_dir, total_updates=10)
    batch, samples = cases.make_batch(torch.float32), range(len(cases.LENGTHS))
    batch.old_logp = batch.old_logp - 3.0
    weights_B, loss = cases.aggregation_weights("token_mean", samples), build_loss("ce_gppo")
    for _ in range(3):
        learner.update(batch, samples, weights_B, loss)
        if not offload:
            continue
        held = _held(learner)
        assert held["gradients"] == held["optimizer"] == 0 < held["weights"], held
        learner.offload(weights=True)
        assert _held(learner)["weights"] == 0
        learner.offload(weights=True)  # a second call has no effect
        learner.reload()
        assert _held(learner)["weights"] == held["weights"] and learner._state, "the state stays on the host"
    learner.reload(optimizer=True)
    assert _held(learner)["optimizer"] > 0 and not learner._state and not learner._weights
    return {name: tensor.clone() for name, tensor in learner.export()}


def _process(rank: int, root: Path) -> None:
    from megatron_ext.learner.model import distributed

    with gloo.group(rank, 2, root / "store"), distributed(ParallelConfig(), seed=1):
        for name, (layout, dtype) in RUNS.items():
            for offload in (False, True):
                result = _trained(layout, dtype, root / "model", offload=offload)
                if rank == 0:
                    save_file(result, root / f"{name}-{offload}")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("offload")
    cases.make_model(root / "model")
    gloo.run(2, _process, root, timeout_s=300)
    return root


@pytest.mark.parametrize("name", RUNS)
def test_training_with_offload_is_the_same_bit_for_bit(root: Path, name: str) -> None:
    plain, offloaded = load_file(root / f"{name}-False"), load_file(root / f"{name}-True")
    start = load_file(root / "model" / "model.safetensors")
    assert all(torch.equal(plain[key], offloaded[key]) for key in plain)
    assert all(not torch.equal(plain[key].float(), start[key]) for key in plain), "every weight has moved"
