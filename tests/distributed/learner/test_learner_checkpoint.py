"""Checkpoints: written in one layout and read in another, refused when damaged, usable after an interrupted save.

Chains of layouts, each loading what the one before it saved; every link must give the statistics at the moment of
saving, and the weights that training on without interruption gives. Runs in two processes, started once.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gloo
import learner_cases as cases
import pytest
import torch
from learner_cases import DP2, DP2_SHARDED, ONE, PP2, TP2, Layout
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.schema import OptimConfig
from megatron_ext.rl.losses import build_loss

if TYPE_CHECKING:
    from megatron_ext.learner.learner import Learner

EP2, TP2_SP_EP2 = Layout("ep2", 2, {"ep": 2}), Layout("tp2-sp-ep2", 2, {"tp": 2, "sp": True, "ep": 2})
CHAINS = {  # the distributed optimizer's checkpoints too fit other layouts, and so do experts
    "plain": (TP2, PP2, DP2, ONE),
    "sharded": (DP2_SHARDED, TP2, ONE),
    "experts": (EP2, PP2, TP2_SP_EP2, ONE),
    "sharded experts": (EP2, ONE, DP2),
}
LR = 1e-3
STATE = {"position": 48, "controller": {"state": 1, "entropy": 0.25}}
DAMAGES = ("flipped byte", "missing file", "no manifest", "truncated state")


def _learner(layout: Layout, model_dir: Path, *, sharded: bool) -> Learner:
    from megatron_ext.learner.learner import Learner

    # No clipping: its norm is computed in float32. The learning rate must be restored because of the warm-up, and the
    # step count because of Adam's bias correction.
    optim = OptimConfig(lr=LR, betas=[0.9, 0.95], weight_decay=0.1, warmup_steps=8, decay="linear", clip_grad=1e9)
    optim.offload = layout in (DP2, DP2_SHARDED)  # state on the host must be saved and restored too
    config = cases.make_config(layout, "float32" if sharded else "float64", optim)
    config.optim.distributed = sharded
    return Learner(config, model_dir, total_updates=20)


def _update(learner: Learner, count: int) -> dict[str, Tensor]:
    """Run ``count`` updates on the whole recorded batch; return the learning rates."""
    batch = cases.make_batch(torch.float64 if learner.config.model.dtype == "float64" else torch.float32)
    batch.old_logp = batch.old_logp - 3.0
    samples = range(len(cases.LENGTHS))
    weights_B, loss = cases.aggregation_weights("token_mean", samples), build_loss("ce_gppo")
    rates = [learner.update(batch, samples, weights_B, loss).means["lr"] for _ in range(count)]
    return {"lr": torch.tensor(rates, dtype=torch.float64)}


def _seen(learner: Learner) -> dict[str, Tensor]:
    batch = cases.make_batch(torch.float32)
    out = {f"weight/{name}": tensor.double().clone() for name, tensor in learner.export()}
    return {**out, "statistics": cases.stack(learner.statistics(batch)).double()}


def _adam_steps(learner: Learner) -> tuple[list[float], int]:
    """Step counts of this rank's Adam, and how many different tensors hold them."""
    parts = getattr(learner.optimizer, "chained_optimizers", [learner.optimizer])
    steps = [state["step"] for part in parts for state in part.optimizer.state.values()]
    return [float(step) for step in steps], len({step.data_ptr() for step in steps})


def _link(previous: Path | None, layout: Layout, root: Path, chain: str) -> dict[str, Tensor]:
    """Load (or train two updates), save, train two more updates; return the state at the save and at the end."""
    from megatron_ext.learner import checkpoint

    model_dir = root / ("moe" if "experts" in chain else "model")
    learner = _learner(layout, model_dir, sharded="sharded" in chain)
    if previous is None:
        _update(learner, 2)
    else:
        assert checkpoint.load(learner, previous) == {"step": 7, **STATE}
    steps, tensors = _adam_steps(learner)
    assert set(steps) == {2.0} and tensors == len(steps) > 1, (steps, tensors)
    at_save = _seen(learner)
    checkpoint.save(learner, root / f"saved-{layout.name}-{chain}", 7, STATE)
    rates = _update(learner, 2)
    assert set(_adam_steps(learner)[0]) == {4.0}
    return {
        **{f"saved/{k}": v for k, v in at_save.items()},
        **{f"end/{k}": v for k, v in _seen(learner).items()},
        **rates,
    }


def _process(rank: int, root: Path) -> None:
    from configs.schema import ParallelConfig
    from megatron_ext.learner.model import distributed

    for chain, layouts in CHAINS.items():
        previous: Path | None = None
        for layout in layouts:
            if rank < layout.world:
                with gloo.group(rank, layout.world, root / f"store-{layout.name}-{chain}"):
                    with distributed(ParallelConfig(**layout.parallel), seed=1):  # type: ignore[arg-type]
                        result = _link(previous, layout, root, chain)
                if rank == 0:
                    save_file(result, root / f"{layout.name}-{chain}.safetensors")
            previous = root / f"saved-{layout.name}-{chain}" / "step_000007"
    if rank == 0:
        with gloo.group(0, 1, root / "store-refusals"), distributed(ParallelConfig(), seed=1):
            (root / "refusals.json").write_text(json.dumps(_refusals(root)))


def _refusals(root: Path) -> dict[str, Any]:
    """The error for each kind of damaged checkpoint, whether any of it was loaded, and an interrupted save."""
    from megatron_ext.learner import checkpoint

    learner = _learner(ONE, root / "model", sharded=False)
    good = root / f"saved-{ONE.name}-plain"
    before = _seen(learner)
    said: dict[str, Any] = {}
    for damage in DAMAGES:
        bad = root / damage.replace(" ", "-")
        shutil.copytree(good / "step_000007", bad)
        _damage(bad, damage)
        said[damage] = _error(checkpoint.load, learner, bad)
    for key in ("distributed", "optimizer", "dtype"):
        other = cases.make_config(ONE, "float32" if key == "dtype" else "float64", OptimConfig())
        other.optim.distributed = key == "distributed"
        other.optim.optimizer = "sgd" if key == "optimizer" else "adam"
        learner.config, ours = other, learner.config
        said[key] = _error(checkpoint.load, learner, good / "step_000007")
        learner.config = ours
    said["untouched"] = all(torch.equal(value, before[name]) for name, value in _seen(learner).items())
    said["untouched"] &= not _adam_steps(learner)[0]
    said["pointer elsewhere"] = _pointer(good, "step_000099\n")
    said["pointer outside"] = _pointer(good, "../secret\n")
    said["pointer empty"] = _pointer(good, "")
    (good / checkpoint.LATEST).write_text("step_000007\n")

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("the disk is gone")

    save, checkpoint.dist_checkpointing.save = checkpoint.dist_checkpointing.save, fails
    said["failed save"] = _error(checkpoint.save, learner, good, 8, STATE)
    checkpoint.dist_checkpointing.save = save
    said["after a failed save"] = sorted(path.name for path in good.iterdir())
    said["latest"] = str(checkpoint.find_latest(good).name)  # type: ignore[union-attr]
    checkpoint.load(learner, good / "step_000007")
    for step in (8, 9):
        checkpoint.save(learner, good, step, STATE, keep=2)
    said["kept"] = sorted(path.name for path in good.iterdir())
    return said


def _damage(directory: Path, damage: str) -> None:
    largest = max(directory.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    if damage == "flipped byte":
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    elif damage == "missing file":
        largest.unlink()
    elif damage == "no manifest":
        (directory / "manifest.json").unlink()
    else:
        path = directory / "state.json"
        path.write_bytes(path.read_bytes()[:-5])


def _pointer(root: Path, text: str) -> str:
    from megatron_ext.learner import checkpoint

    (root / checkpoint.LATEST).write_text(text)
    return _error(checkpoint.find_latest, root)


def _error(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    cases.make_model(root / "model")
    cases.make_moe_model(root / "moe")
    gloo.run(2, _process, root, timeout_s=600)
    return root


@pytest.fixture(scope="module")
def said(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "refusals.json").read_text()))


@pytest.mark.parametrize("chain, layout", [(name, link.name) for name, links in CHAINS.items() for link in links[1:]])
def test_a_checkpoint_continues_in_another_layout(root: Path, chain: str, layout: str) -> None:
    """Adam's moments and step count, the learning rate and the weights are all needed to reach the same result."""
    sharded = "sharded" in chain
    expected = load_file(root / f"{CHAINS[chain][0].name}-{chain}.safetensors")
    got = load_file(root / f"{layout}-{chain}.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.startswith("saved/weight/"):
            assert torch.equal(got[name], tensor), f"{name} was not restored bit for bit"
        elif sharded and name.startswith("end/weight/"):  # two steps of Adam in float32: relative to a step's length
            difference = (got[name] - tensor).abs()
            assert float(difference.max()) < LR and float(difference.mean()) < 1e-3 * LR, name
        else:
            atol = 1e-4 if sharded else 1e-10
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert expected["lr"].tolist() == pytest.approx([LR * 3 / 8, LR * 4 / 8]), "the warm-up goes on where it was"
    moved = (expected["end/weight/model.norm.weight"] - expected["saved/weight/model.norm.weight"]).abs().max()
    assert float(moved) > 0.3 * LR, "the last two updates can be seen"


@pytest.mark.parametrize(
    "damage, sentence",
    {
        "flipped byte": "ManifestError: .*does not have the bytes that the manifest promises",
        "missing file": "ManifestError: .*is missing, although the manifest lists it",
        "no manifest": "ManifestError: .*has no manifest",
        "truncated state": "ManifestError: .*state.json has .* bytes but the manifest says",
        "distributed": "ValueError: .*was written with optim.distributed=False, not True: set it back",
        "optimizer": "ValueError: .*was written with optim.optimizer=adam, not sgd: set it back",
        "dtype": "ValueError: .*was written with model.dtype=float64, not float32: set it back",
        "pointer elsewhere": "ValueError: .*names 'step_000099', which is not a checkpoint there",
        "pointer outside": "ValueError: .*names '../secret', which is not a checkpoint there",
        "pointer empty": "ValueError: .*names '', which is not a checkpoint there",
    }.items(),
)
def test_what_is_not_a_whole_checkpoint_is_refused(said: dict[str, Any], damage: str, sentence: str) -> None:
    assert re.match(sentence, said[damage]), said[damage]
    assert "\n" not in said[damage]


def test_nothing_of_a_refused_checkpoint_is_loaded(said: dict[str, Any]) -> None:
    assert said["untouched"] is True


def test_a_failed_save_leaves_the_previous_checkpoint(said: dict[str, Any]) -> None:
    assert said["failed save"] == "OSError: the disk is gone"
    assert said["after a failed save"] == ["latest", "step_000007"]
    assert said["latest"] == "step_000007"


def test_only_the_newest_checkpoints_are_kept(said: dict[str, Any]) -> None:
    assert said["kept"] == ["latest", "step_000008", "step_000009"]
