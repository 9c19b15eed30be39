"""Each rank writes and reads its own part of a checkpoint, in Megatron's format, also during training.

Two data-parallel processes with the distributed optimizer, started once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gloo
import learner_cases as cases
import pytest
import torch
from learner_cases import DP2_SHARDED, Layout
from torch import Tensor

from configs.schema import OptimConfig
from megatron_ext.rl.losses import build_loss

if TYPE_CHECKING:
    from megatron_ext.learner.learner import Learner

TP2_SHARDED = Layout("tp2-distributed-optimizer", 2, {"tp": 2}, distributed_optimizer=True)


def _learner(model_dir: Path, layout: Layout = DP2_SHARDED, dtype: str = "bfloat16") -> Learner:
    from megatron_ext.learner.learner import Learner

    optim = OptimConfig(lr=1e-2, warmup_steps=4, decay="linear")
    return Learner(cases.make_config(layout, dtype, optim), model_dir, total_updates=20)


def _update(learner: Learner, count: int = 1) -> None:
    batch, samples = cases.make_batch(torch.float32), range(len(cases.LENGTHS))
    batch.old_logp = batch.old_logp - 3.0
    for _ in range(count):
        learner.update(batch, samples, cases.aggregation_weights("token_mean", samples), build_loss("ppo"))


def _state(learner: Learner) -> list[Tensor]:
    """Weights, master weights, moments and steps of this rank, and the schedule's position."""
    from megatron_ext.learner.offload import model_tensors, optimizer_tensors

    tensors = [*model_tensors(learner.chunks), *optimizer_tensors(learner.optimizer, learner.chunks)]
    steps = [s["step"] for s in learner.optimizer.chained_optimizers[0].optimizer.state.values()]
    return [t.detach().clone() for t in (*tensors, *steps, torch.tensor(learner.lr_schedule.num_steps))]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _megatron(function: Callable[[], Any], learner: Learner) -> Any:
    """Call ``function`` with Megatron's own code for saving and loading the state of its distributed optimizer."""
    from megatron_ext.learner import checkpoint

    part = learner.optimizer.chained_optimizers[0]
    for name in ("sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable"):
        vars(part).pop(name, None)
    # Megatron expects a step among the stored tensors; torch's Adam stores none there.
    of_parameter = part._get_main_param_and_optimizer_states
    set_states = type(part)._set_main_param_and_optimizer_states
    part._set_main_param_and_optimizer_states = lambda p, tensors: set_states(
        part, p, {"step": of_parameter(p)["step"], **tensors}
    )
    use, checkpoint.use_pieces = checkpoint.use_pieces, lambda _: None
    try:
        return function()
    finally:
        checkpoint.use_pieces = use


def _process(rank: int, root: Path) -> None:
    from configs.schema import ParallelConfig
    from megatron_ext.learner.model import distributed

    for name, layout, cases_ in (("dp", DP2_SHARDED, _replicas), ("tp", TP2_SHARDED, _slices)):
        with gloo.group(rank, 2, root / f"store-{name}"):
            with distributed(ParallelConfig(**layout.parallel), seed=1):  # type: ignore[arg-type]
                said = cases_(root, rank)
        (root / f"{name}-{rank}.json").write_text(json.dumps(said))


def _replicas(root: Path, rank: int) -> dict[str, Any]:
    from megatron_ext.learner import checkpoint, optimizer_pieces

    said: dict[str, Any] = {}
    learner, other = _learner(root / "model"), _learner(root / "model")
    _update(learner, 2)
    before = _state(learner)

    gathers = _count_gathers(lambda: checkpoint.save(learner, root / "ours", 2, {}))
    said["gathered by us"] = gathers
    said["unchanged by saving"] = _same(_state(learner), before)
    checkpoint.load(other, root / "ours" / "step_000002")
    said["ours read by us"] = _same(_state(other), before)
    third = _learner(root / "model")
    _megatron(lambda: checkpoint.load(third, root / "ours" / "step_000002"), third)
    said["ours read by Megatron"] = _same(_state(third), before)
    said["gathered by Megatron"] = _count_gathers(
        lambda: _megatron(lambda: checkpoint.save(learner, root / "theirs", 2, {}), learner)
    )
    fourth = _learner(root / "model")
    checkpoint.load(fourth, root / "theirs" / "step_000002")
    said["theirs read by us"] = _same(_state(fourth), before)

    said |= _in_background(learner, other, root, before)
    part = learner.optimizer.chained_optimizers[0]
    model_state = {"model": learner.chunks[0].module.sharded_state_dict()}
    pieces = optimizer_pieces.state_pieces(part, model_state)
    data = [t for of in pieces.values() for by_name in of.values() for t in by_name.values()]
    own = {t.untyped_storage().data_ptr() for t in _live(part)}
    said["views"] = all(t.data.untyped_storage().data_ptr() in own for t in data)
    said["elements"] = sum(t.data.numel() for t in data) / 3
    said["all elements"] = sum(p.numel() for p in learner.chunks[0].parameters())
    return said


def _live(part: Any) -> list[Tensor]:
    groups = [p for group in part.optimizer.param_groups for p in group["params"]]
    return [*groups, *(v for s in part.optimizer.state.values() for v in s.values())]


def _in_background(learner: Learner, other: Learner, root: Path, before: list[Tensor]) -> dict[str, Any]:
    """A save whose write is delayed until after two more updates, with and without the copy."""
    from megatron_ext.learner import checkpoint, checkpoint_files

    said: dict[str, Any] = {}
    write = checkpoint_files.PlannedFile.write
    released = threading.Event()

    def slow(self: Any) -> Any:
        released.wait()
        return write(self)

    checkpoint_files.PlannedFile.write = slow  # type: ignore[method-assign]
    for name in ("copied", "not copied"):
        if name == "not copied":
            checkpoint_files.Staging.copy = lambda _, tensors: tensors  # type: ignore[method-assign]
        state = before if name == "copied" else _state(learner)
        saver = checkpoint.Saver(root / name, background=True)
        released.clear()
        saver.save(learner, 2, {"position": 3})
        _update(learner, 2)
        said[f"{name}: published before written"] = (root / name / "step_000002").exists()
        released.set()
        saver.wait()
        assert checkpoint.load(other, root / name / "step_000002") == {"step": 2, "position": 3}
        said[f"{name}: as it was"] = _same(_state(other), state)
        said[f"{name}: bytes"] = saver.staged_bytes
        said[f"{name}: seconds"] = saver.report()["timing_s/checkpoint"]

    def full(self: Any) -> Any:
        raise OSError("the disk is full")

    checkpoint_files.PlannedFile.write = full  # type: ignore[method-assign]
    saver = checkpoint.Saver(root / "copied", background=True)
    saver.save(learner, 9, {})
    try:
        saver.wait()
    except OSError as error:
        said["failed"] = str(error)
    checkpoint_files.PlannedFile.write = write  # type: ignore[method-assign]
    torch.distributed.barrier()
    said["after failing"] = sorted(path.name for path in (root / "copied").iterdir())
    return said


def _count_gathers(function: Callable[[], Any]) -> int:
    """Count calls of collectives that gather tensors of several ranks."""
    calls = 0
    originals = {name: getattr(torch.distributed, name) for name in ("all_gather", "gather")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(torch.distributed, name, counting(name))
    try:
        function()
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)
    return calls


def _slices(root: Path, rank: int) -> dict[str, Any]:
    """Two replicas write; two tensor-parallel ranks read and write; one of two replicas reads."""
    from megatron_ext.learner import checkpoint

    learner = _learner(root / "model", TP2_SHARDED)
    checkpoint.load(learner, root / "ours" / "step_000002")
    before = _state(learner)
    third = _learner(root / "model", TP2_SHARDED)
    _megatron(lambda: checkpoint.load(third, root / "ours" / "step_000002"), third)
    return {"as Megatron reads it": _same(_state(third), before)}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("pieces")
    cases.make_model(root / "model")
    gloo.run(2, _process, root, timeout_s=300)
    return [
        json.loads((root / f"dp-{rank}.json").read_text()) | json.loads((root / f"tp-{rank}.json").read_text())
        for rank in range(2)
    ]


@pytest.mark.parametrize(
    "what",
    ["unchanged by saving", "ours read by us", "ours read by Megatron", "theirs read by us", "as Megatron reads it"],
)
def test_all_state_comes_back_bit_for_bit(said: list[dict[str, Any]], what: str) -> None:
    """bfloat16: weights, float32 master weights, moments, steps, schedule; written and read by us and by Megatron."""
    assert [rank[what] for rank in said] == [True, True]


def test_nothing_is_gathered(said: list[dict[str, Any]]) -> None:
    for rank in said:
        assert rank["gathered by us"] == 0
        assert rank["gathered by Megatron"] > 0, "the count would see it"
        assert rank["views"], "pieces share memory with the state"
    assert sum(rank["elements"] for rank in said) == said[0]["all elements"]
    assert abs(said[0]["elements"] - said[1]["elements"]) < 0.1 * said[0]["all elements"], "half each"


def test_later_updates_do_not_leak_into_a_checkpoint(said: list[dict[str, Any]]) -> None:
    for rank in said:
        assert rank["copied: published before written"] is False
        assert rank["copied: as it was"] is True
        assert rank["not copied: as it was"] is False, "the test would see a leak"
    # 12 bytes of state for this rank's half of the parameters, and its share of the weights, 2 bytes each.
    total = sum(rank["copied: bytes"] for rank in said)
    assert total == pytest.approx(14 * said[0]["all elements"], rel=0.15), "alignment of many small tensors"


def test_a_failed_write_in_the_background_is_raised_and_leaves_nothing(said: list[dict[str, Any]]) -> None:
    assert said[0]["failed"] == "the disk is full" and said[1]["failed"] == "the disk is full"
    assert said[0]["after failing"] == ["latest", "step_000002"]
