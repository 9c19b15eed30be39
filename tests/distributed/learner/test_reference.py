"""The reference policy: its log-probabilities, its term of the objective and its trace, in every layout.

One process is checked against transformers and autograd; the layouts against one process; a run with a reference is
replayed and resumed. All tests share two processes that are started once.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gloo
import learner_cases as cases
import pytest
import torch
from learner_cases import DP2, ONE, PP2, TP2, Layout
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.schema import OptimConfig, ReferenceConfig
from megatron_ext.rl.losses import build_loss

TP2_SP, CP2 = Layout("tp2-sp", 2, {"tp": 2, "sp": True}), Layout("cp2", 2, {"cp": 2})
LAYOUTS = (TP2, TP2_SP, PP2, DP2, CP2)
LR, COEF = 0.01, 0.3
KINDS = ("k1", "k2", "k3")
RUN = (
    *("rollout.engine=local", "reward.name=random", "run.report_every=0", "reference.kl_coef=0.5", "optim.lr=1e-2"),
    *("rollout.prompts_per_step=2", "rollout.n=2", "rollout.max_tokens=6", "train.steps=2"),
    *(
        "train.mini_batch_prompts=1",
        "train.save_every=1",
        "train.keep_checkpoints=9",
        "eval.problems=2",
        "eval.n=1",
        "eval.k=[1]",
    ),
)


def _make_reference(directory: Path, policy: Path) -> None:
    """The policy's model with every weight changed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(directory)


def _layout(layout: Layout, root: Path) -> dict[str, Tensor]:
    """One update by the reference's term alone (advantages are 0) per kind of estimator, from the same weights."""
    from megatron_ext.learner import weights
    from megatron_ext.learner.learner import Learner

    config = cases.make_config(layout, "float64", OptimConfig(optimizer="sgd", lr=LR, clip_grad=1e9))
    config.reference = ReferenceConfig(kl_coef=COEF, path=str(root / "reference"))
    config.run.peak_tflops = 2.0
    learner = Learner(config, root / "model", total_updates=10)
    assert learner.reference is not None
    batch, samples = cases.make_batch(torch.float64), range(len(cases.LENGTHS))
    batch.old_logp = learner.statistics(batch).logp
    for part in (batch.advantages, batch.kl_coef, batch.entropy_coef):
        part.zero_()
    batch.is_weight.fill_(1.0)
    before = {name: tensor.clone() for name, tensor in learner.export()}
    batch.ref_logp = learner.reference.logp(batch)
    after = {name: tensor.clone() for name, tensor in learner.export()}
    assert all(torch.equal(before[name], after[name]) for name in before), "the policy is back where it was"
    assert torch.equal(learner.statistics(batch).logp, batch.old_logp)
    out = {"logp": batch.ref_logp}
    for kind in KINDS:
        weights.import_hf(learner.hf, root / "model", learner.chunks)
        config.reference.kl_type = kind
        weights_B = cases.aggregation_weights("token_mean", samples)
        means = learner.update(batch, samples, weights_B, build_loss("ppo")).means
        out |= {f"{kind}/{n}": torch.tensor(means[n], dtype=torch.float64) for n in ("kl_ref", "loss", "grad_norm")}
        out |= {f"{kind}/gradient/{n}": (before[n] - t).double() / LR for n, t in learner.export()}
    work = learner.work_report()
    assert (work.ranks, work.peak_tflops) == (layout.world, 2.0) and work.peak_memory_gib > 0.1
    assert work.time_imbalance >= 0 and 0 <= work.token_imbalance < 0.5
    assert (work.token_imbalance > 0) == (layout == DP2), "only data-parallel ranks have different tokens"
    assert learner.work_report().flops == 0, "counted since the last report"
    return out | {"flops": torch.tensor(work.flops, dtype=torch.float64)}


def _runs(root: Path) -> None:
    """Run live, replay the run, and resume it from its first checkpoint, all in this process."""
    from recipes.launch import launch
    from recipes.loop.run_dir import RunDir
    from recipes.models.prepare import make_tiny_model
    from recipes.train import train

    RunDir._report = lambda self: self.path / "report.html"  # type: ignore[method-assign]
    model = make_tiny_model(root / "tiny", seed=0)

    def run(name: str, *extra: str) -> None:
        assert launch(train, [f"model.path={model}", f"run.dir={root / name}", *RUN, *extra]) == 0, name

    run("live")
    run("replay", f"rollout.replay={root / 'live'}")
    shutil.copytree(root / "live", root / "again", symlinks=True)
    (root / "again" / "checkpoints" / "latest").write_text("step_000001\n")
    run("again")


def _process(rank: int, root: Path) -> None:
    from configs.schema import ParallelConfig
    from megatron_ext.learner.model import distributed

    for layout in (ONE, *LAYOUTS):
        if rank < layout.world:
            with gloo.group(rank, layout.world, root / f"store-{layout.name}"):
                with distributed(ParallelConfig(**layout.parallel), seed=1):  # type: ignore[arg-type]
                    results = _layout(layout, root)
                if rank == 0:
                    save_file({k: v.contiguous() for k, v in results.items()}, root / layout.name)
    if rank == 0:
        _runs(root)


# --- the tests ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reference")
    cases.make_model(root / "model")
    _make_reference(root / "reference", root / "model")
    gloo.run(2, _process, root, timeout_s=300)
    return root


def _logp(model: Any, batch: Any) -> Tensor:
    rows = []
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        logp = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        rows.append(logp.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(rows)


def test_one_process_is_what_transformers_and_autograd_say(root: Path) -> None:
    """transformers computes its norms in float32 whatever the model's type, hence the tolerance.

    k2 and k3 are differentiated directly. k1 acts as a penalty in the reward: (d detached) * logp.
    """
    from transformers import AutoModelForCausalLM

    results, batch = load_file(root / "one"), cases.make_batch(torch.float64)
    with torch.no_grad():
        reference = _logp(AutoModelForCausalLM.from_pretrained(root / "reference", dtype=torch.float64), batch)
    torch.testing.assert_close(results["logp"], reference, rtol=1e-5, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64)
    logp = _logp(model, batch)
    d = logp - reference
    assert 0.1 < float(d.abs().mean().detach()) < 5
    values = {"k1": d.detach() * logp, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}
    for kind, value in values.items():
        model.zero_grad()
        (COEF * value[batch.mask].mean()).backward(retain_graph=True)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                scale = max(1.0, float(parameter.grad.abs().max()))
                got = results[f"{kind}/gradient/{name}"]
                assert float((got - parameter.grad).abs().max()) < 1e-4 * scale, (kind, name)
        said = d if kind == "k1" else value
        expected = float(said[batch.mask].mean().detach())
        assert float(results[f"{kind}/kl_ref"]) == pytest.approx(expected, rel=1e-4)
        assert float(results[f"{kind}/loss"]) == pytest.approx(COEF * expected, rel=1e-4)


def test_every_pass_is_counted_once(root: Path) -> None:
    """Two statistics passes, one of the reference, three updates of three times the work: 12 forward passes.

    Two layers of query, output 32 x 32, key, value 16 x 32, three MLP matrices 48 x 32; four heads of 8; 37 tokens.
    """
    batch, expected = cases.make_batch(torch.float64), 0
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        fed = len(prompt) + len(response) - 1
        weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) * fed + 37 * 32 * len(response)
        attention = 2 * (4 * 8) * 2 * fed * (fed + 1) // 2
        expected += 2 * (weights + attention)
    assert float(load_file(root / "one")["flops"]) == 12 * expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_agree_in_float64(root: Path, layout: Layout) -> None:
    """The norm is computed by Megatron in float32."""
    got, expected = load_file(root / layout.name), load_file(root / "one")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        limit = 1e-6 if name.endswith("/grad_norm") else 1e-10
        assert float((got[name] - tensor).abs().max()) <= limit * max(1.0, float(tensor.abs().max())), name


def _metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))} for row in rows]


def test_a_run_reports_its_distance_from_where_it_started(root: Path) -> None:
    """The distance is measured by k3, whose values are not negative."""
    rows = _metrics(root / "live")
    assert rows[1]["actor/kl_ref"] > 0.1 and rows[1]["actor/kl_ref"] > rows[0]["actor/kl_ref"] >= 0


@pytest.mark.parametrize("name", ["replay", "again"])
def test_replayed_and_resumed_runs_are_the_same_bit_for_bit(root: Path, name: str) -> None:
    """Resuming reads the reference from its original path, not from the checkpoint's trained weights."""
    assert _metrics(root / name) == _metrics(root / "live")
    weights = [load_file(root / run / "hf" / "model.safetensors") for run in (name, "live")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
