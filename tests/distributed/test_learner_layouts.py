"""The learner in every layout: the same statistics, selections, objective, gradients and weights as one process.

Each layout trains the same recorded batch (`learner_cases`); rank 0 writes what it saw, and the tests compare. In
float64 gradients are compared through SGD, whose first step is -lr times the gradient, tensor by tensor. All of it runs
in four processes that are started once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gloo
import learner_cases as cases
import pytest
import torch
from learner_cases import DP2, DP2_SHARDED, ONE, PP2, TP2, TP2_DP2_SHARDED, TP2_PP2, Layout
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.schema import OptimConfig
from megatron_ext.rl.aggregation import AGGREGATIONS
from megatron_ext.rl.losses import build_loss
from megatron_ext.rl.selection import SelectionInputs, build_selection

if TYPE_CHECKING:
    from megatron_ext.learner.learner import Learner

LOSSES: dict[str, dict[str, Any]] = {
    "ce_gppo": {"beta1": 0.5, "beta2": 0.8},
    "gspo": {"eps_low": 0.02, "eps_high": 0.02},
    "dynamic_clip": {"strategy": "id", "step": 3, "total_steps": 10},
}
SELECTIONS: dict[str, dict[str, Any]] = {
    "clip_b": {"mu_low": 0.5, "mu_high": 0.5, "tokens": "all"},
    "clip_v": {"mu_low": 0.5, "mu_high": 0.5, "tokens": "all"},
    "clip_cov": {"frac": 0.2, "cov_low": -1.0, "cov_high": 1.0},
    "kl_cov": {"frac": 0.2},
    "forking": {"frac": 0.3},
}
CASES = [f"{loss}/{aggregation}" for loss in LOSSES for aggregation in AGGREGATIONS]
MINI_BATCHES = ([0, 1, 2, 3, 4], [10], [5, 6, 7, 8, 9])  # the second has fewer samples than there are replicas
SHUFFLED = [7, 2, 9, 0, 10, 4, 1, 6, 8, 3, 5]
PLAIN = (TP2, PP2, DP2, TP2_PP2)  # SGD and Adam; Megatron's distributed optimizer takes Adam only, and float32
SHARDED = (DP2_SHARDED, TP2_DP2_SHARDED)
SGD_LR, ADAM_LR = 0.01, 1e-3
FAR = 1e9  # a clipping norm that is never reached

Results = dict[str, Tensor]


# --- in the spawned processes -------------------------------------------------------------------------------------


def _exported(learner: Learner) -> Results:
    return {name: tensor.clone() for name, tensor in learner.export()}


def _case(learner: Learner, model_dir: Path, case: str, order: list[int] | None = None) -> Results:
    """Three updates from the model's own weights; everything that came out, float64."""
    from megatron_ext.learner import weights

    loss_name, aggregation = case.split("/")
    loss = build_loss(loss_name, **LOSSES[loss_name])
    dtype = torch.float64 if learner.config.model.dtype == "float64" else torch.float32
    batch = cases.make_batch(dtype, order)
    weights.import_hf(learner.hf, model_dir, learner.chunks)
    stats = learner.statistics(batch)
    batch.old_logp = stats.logp + batch.old_logp
    out: Results = {"statistics": cases.stack(stats)}
    out |= _selected(batch, stats)
    place = list(range(len(cases.LENGTHS))) if order is None else [order.index(i) for i in range(len(order))]
    before = _exported(learner)
    for number, samples in enumerate(MINI_BATCHES):
        mini = [place[i] for i in samples]
        weights_B = cases.aggregation_weights(aggregation, mini, order)
        inside = build_selection("region", region="e3").inside if number == 2 else None
        result = learner.update(batch, mini, weights_B, loss, selection_inside=inside)
        out |= {f"metric/{number}/{name}": torch.tensor(value) for name, value in result.means.items()}
        out |= {f"metric/{number}/sum {name}": torch.tensor(v) for name, v in result.diagnostic_sums.items()}
        if number == 0:
            out |= {f"moved/{name}": before[name] - tensor for name, tensor in _exported(learner).items()}
    out |= {f"weight/{name}": tensor for name, tensor in _exported(learner).items()}
    out["after"] = cases.stack(learner.statistics(batch))
    return {name: tensor.double() for name, tensor in out.items()}


def _selected(batch: Any, stats: Any) -> Results:
    inputs = SelectionInputs(
        stats=stats,
        advantages=batch.advantages,
        mask=batch.mask,
        seq_ids=batch.seq_ids,
        positions=torch.arange(len(batch.seq_ids)) - batch.offsets[batch.seq_ids],
        seed=3,
        step=0,
    )
    found = {name: build_selection(name, **params).select(inputs) for name, params in SELECTIONS.items()}
    return {f"selected/{name}": torch.stack([out.keep.double(), out.kl_coef.double()]) for name, out in found.items()}


def _trained(layout: Layout, model_dir: Path, dtype: str, optim: OptimConfig, names: list[str]) -> Results:
    """The named cases, all with one learner (SGD has no state; Adam's would leak, so it gets a single case)."""
    from megatron_ext.learner.learner import Learner

    learner = Learner(cases.make_config(layout, dtype, optim), model_dir, total_updates=100)
    exported = _exported(learner)
    assert len(names) == 1 or optim.optimizer == "sgd"
    out = {f"{n}/{key}": value for n in names for key, value in _case(learner, model_dir, n).items()}
    return out | {f"initial/{name}": tensor for name, tensor in exported.items()}


def _sgd(clip_grad: float = FAR) -> OptimConfig:
    return OptimConfig(optimizer="sgd", lr=SGD_LR, clip_grad=clip_grad)


def _adam() -> OptimConfig:
    return OptimConfig(optimizer="adam", lr=ADAM_LR, betas=[0.9, 0.95], weight_decay=0.1, clip_grad=FAR)


def _layout(layout: Layout, model_dir: Path) -> dict[str, Results]:
    """What is measured in one layout, by name of the experiment."""
    out = {"adam-float32": _trained(layout, model_dir, "float32", _adam(), CASES[:1])}
    if layout.distributed_optimizer:
        return out
    out["adam-float64"] = _trained(layout, model_dir, "float64", _adam(), CASES[:1])
    out["sgd-float64"] = _trained(layout, model_dir, "float64", _sgd(), CASES)
    out["sgd-float32"] = _trained(layout, model_dir, "float32", _sgd(), CASES[:1])
    out["clipped"] = _trained(layout, model_dir, "float64", _sgd(clip_grad=0.1), CASES[:1])
    if layout == ONE:
        out |= _cuts(model_dir)
    return out


def _cuts(model_dir: Path) -> dict[str, Results]:
    """One process, float64, the batch cut in other ways."""
    from megatron_ext.learner.learner import Learner

    out: dict[str, Results] = {}
    settings = {"all-in-one": (1 << 16, 0), "one-each": (1, 0), "chunked": (16, 5)}
    for name, (tokens, chunk) in settings.items():
        config = cases.make_config(ONE, "float64", _sgd(), micro_batch_tokens=tokens)
        config.train.loss_chunk_tokens = chunk
        config.model.recompute = name == "chunked"
        learner = Learner(config, model_dir, total_updates=100)
        out[name] = {f"{n}/{k}": v for n in CASES for k, v in _case(learner, model_dir, n).items()}
        if name == "all-in-one":
            out["shuffled"] = {f"{n}/{k}": v for n in CASES for k, v in _case(learner, model_dir, n, SHUFFLED).items()}
    return out


def _process(rank: int, root: Path) -> None:
    from configs.schema import ParallelConfig
    from megatron_ext.learner.model import distributed

    for layout in (ONE, *PLAIN, *SHARDED):
        if rank < layout.world:
            with gloo.group(rank, layout.world, root / f"store-{layout.name}"):
                with distributed(ParallelConfig(**layout.parallel), seed=1):  # type: ignore[arg-type]
                    results = _layout(layout, root / "model")
                if rank == 0:
                    for name, tensors in results.items():
                        save_file({k: v.contiguous() for k, v in tensors.items()}, root / f"{layout.name}.{name}")


# --- the tests ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every layout has left its results, beside the model."""
    root = tmp_path_factory.mktemp("layouts")
    cases.make_model(root / "model")
    gloo.run(4, _process, root, timeout_s=600)
    return root


def load(root: Path, layout: Layout, experiment: str) -> Results:
    return load_file(root / f"{layout.name}.{experiment}")


def _restore_order(results: Results) -> Results:
    """Per-token tensors of the shuffled batch, back in the original order."""
    starts = torch.tensor([0, *(cases.LENGTHS[i] for i in SHUFFLED)]).cumsum(0)
    back = torch.cat([torch.arange(n) + starts[SHUFFLED.index(i)] for i, n in enumerate(cases.LENGTHS)])
    per_token = ("statistics", "after", "selected")
    return {k: v[:, back] if any(f"/{name}" in k for name in per_token) else v for k, v in results.items()}


def _check_equal(got: Results, expected: Results, *, rtol: float, norm_rtol: float = 1e-6, floor: float = 1e-3) -> None:
    """Everything a case gave. Differences are relative to the largest number of the tensor, at least ``floor``.

    The reported gradient norm is computed by Megatron in float32 and has a tolerance of its own.
    """
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), floor)
        limit = norm_rtol if name.endswith("grad_norm") else rtol
        worst = float((got[name] - tensor).abs().max()) / scale
        assert worst <= limit, f"{name}: {worst:.2e} of its largest value"


@pytest.mark.parametrize("layout", PLAIN, ids=lambda layout: layout.name)
def test_layouts_agree_in_float64(root: Path, layout: Layout) -> None:
    _check_equal(load(root, layout, "sgd-float64"), load(root, ONE, "sgd-float64"), rtol=1e-10)


@pytest.mark.parametrize("cut", ["all-in-one", "one-each", "chunked"])
def test_micro_batches_do_not_matter(root: Path, cut: str) -> None:
    expected = {
        name: value for name, value in load(root, ONE, "sgd-float64").items() if not name.startswith("initial/")
    }
    _check_equal(load(root, ONE, cut), expected, rtol=1e-10)


def test_order_of_samples_does_not_matter(root: Path) -> None:
    expected, got = load(root, ONE, "all-in-one"), _restore_order(load(root, ONE, "shuffled"))
    random = [name for name in got if "clip_cov" in name]  # picks are keyed by the place in the batch
    for name in random:
        assert got.pop(name)[0].sum() == expected.pop(name)[0].sum(), "but their number is not"
    _check_equal(got, expected, rtol=1e-10)


@pytest.mark.parametrize("layout", PLAIN, ids=lambda layout: layout.name)
def test_layouts_agree_in_float32(root: Path, layout: Layout) -> None:
    got, expected = load(root, layout, "sgd-float32"), load(root, ONE, "sgd-float32")
    for name in [name for name in expected if "/moved/" in name]:  # float32 weights hold too few digits of a change
        del got[name], expected[name]
    _check_equal(got, expected, rtol=1e-5, norm_rtol=1e-5, floor=0.1)  # pg_loss is a sum that cancels


@pytest.mark.parametrize("layout", PLAIN, ids=lambda layout: layout.name)
def test_clipping_by_the_global_norm(root: Path, layout: Layout) -> None:
    """The norm is over all parameters once: shards counted, replicas not. Clipping multiplies by a float32 number."""
    got, expected = load(root, layout, "clipped"), load(root, ONE, "clipped")
    _check_equal(got, expected, rtol=1e-6)
    norm = torch.cat([v.flatten() for k, v in got.items() if "/moved/" in k]).norm() / SGD_LR
    assert float(norm) == pytest.approx(0.1, rel=1e-4), "the clipped gradient has the configured norm"


@pytest.mark.parametrize("layout", (ONE, *PLAIN), ids=lambda layout: layout.name)
def test_reported_norm_is_that_of_the_exported_gradient(root: Path, layout: Layout) -> None:
    results = load(root, layout, "sgd-float64")
    for case in CASES:
        moved = [value.flatten() for name, value in results.items() if name.startswith(f"{case}/moved/")]
        assert float(results[f"{case}/metric/0/grad_norm"]) == pytest.approx(
            float(torch.cat(moved).norm()) / SGD_LR, rel=1e-6
        )


@pytest.mark.parametrize("layout", (*PLAIN, *SHARDED), ids=lambda layout: layout.name)
def test_adam_agrees(root: Path, layout: Layout) -> None:
    """Adam turns the noise of a gradient near 0 into a step of lr, but float64 leaves hardly any noise."""
    if not layout.distributed_optimizer:
        _check_equal(load(root, layout, "adam-float64"), load(root, ONE, "adam-float64"), rtol=1e-8)
    got, expected = load(root, layout, "adam-float32"), load(root, ONE, "adam-float32")
    for name in (name for name in expected if "/weight/" in name):
        difference = (got[name] - expected[name]).abs()
        assert float(difference.max()) <= 3 * 2 * ADAM_LR, name  # every one of 3 steps in opposite directions
        assert float(difference.mean()) <= 1e-3 * ADAM_LR, name


@pytest.mark.parametrize("layout", (ONE, *PLAIN, *SHARDED), ids=lambda layout: layout.name)
def test_export_before_training_is_the_checkpoint(root: Path, layout: Layout) -> None:
    source = load_file(root / "model" / "model.safetensors")
    exported = {k.removeprefix("initial/"): v for k, v in load(root, layout, "adam-float32").items() if "initial/" in k}
    assert exported.keys() == source.keys()
    assert all(torch.equal(exported[name], source[name]) and exported[name].dtype == torch.float32 for name in source)


@pytest.mark.parametrize("layout", (ONE, *PLAIN, *SHARDED), ids=lambda layout: layout.name)
def test_statistics_equal_transformers_before_and_after(root: Path, layout: Layout) -> None:
    """Of the weights as exported, sequence by sequence, without packing."""
    from transformers import AutoModelForCausalLM

    results = load(root, layout, "adam-float32")
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    for weights, statistics in (("initial/", "statistics"), (f"{CASES[0]}/weight/", "after")):
        exported = {k.removeprefix(weights): v.float() for k, v in results.items() if k.startswith(weights)}
        model.load_state_dict(exported, strict=False)
        model.tie_weights()
        expected = _textbook_statistics(model)
        torch.testing.assert_close(results[f"{CASES[0]}/{statistics}"], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def _textbook_statistics(model: Any) -> Tensor:
    batch = cases.make_batch(torch.float32)
    columns = []
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        logp = logits.log_softmax(-1)
        p = logp.exp()
        taken = logp.gather(1, torch.tensor(response)[:, None])[:, 0]
        columns.append(torch.stack([taken, -(p * logp).sum(-1), (p * p).sum(-1), (p * p * logp).sum(-1)]))
    return torch.cat(columns, dim=1)


def test_the_batch_exercises_what_is_compared(root: Path) -> None:
    results = load(root, ONE, "sgd-float64")
    for loss in LOSSES:
        for side in ("low", "high"):
            shares = [float(results[f"{loss}/token_mean/metric/{n}/pg_clipfrac_{side}"]) for n in (0, 1, 2)]
            assert 0.02 < max(shares) and min(shares) < 0.9, (loss, side, shares)
    for name in SELECTIONS:
        kept, penalised = results[f"{CASES[0]}/selected/{name}"]
        assert 0 < kept.sum() < sum(cases.LENGTHS) and bool(penalised.any()) == (name == "kl_cov"), name
    norms = {float(results[f"{case}/metric/0/grad_norm"]) for case in CASES}
    assert len(norms) == len(CASES), "no two objectives are the same"
