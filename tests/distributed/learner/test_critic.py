"""The critic: the same values, gradients and norm in every layout, exact resume, and whole runs with GAE.

Values and gradients of one process are checked against transformers and autograd; the layouts against one process.
All tests share four processes that are started once.
"""

from __future__ import annotations

import json
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

if TYPE_CHECKING:
    from megatron_ext.learner.critic import Critic
    from megatron_ext.learner.step import TrainBatch

TP2_SP, CP2 = Layout("tp2-sp", 2, {"tp": 2, "sp": True}), Layout("cp2", 2, {"cp": 2})
TP2_SP_CP2 = Layout("tp2-sp-cp2", 4, {"tp": 2, "sp": True, "cp": 2})
LAYOUTS = (TP2, TP2_SP, PP2, DP2, CP2, TP2_SP_CP2)
LR, CLIP_RANGE = 0.01, 0.4
MINI = [0, 1, 2, 3, 4, 5, 8]  # sample 5 is filtered
HEAD = torch.sin(torch.arange(32, dtype=torch.float64))[None]  # not 0, which would give the body no gradient
# Three steps on random rewards (a random model solves nothing), the first of the critic alone.
RUN = (
    *("rollout.engine=local", "reward.name=random", "run.report_every=0", "advantage.name=gae", "critic.lr=1e-2"),
    *("advantage.params.lam=0.9", "critic.warmup_steps=1", "critic.clip_range=0.2", "rollout.prompts_per_step=2"),
    *("rollout.n=4", "rollout.max_tokens=8", "train.mini_batch_prompts=1", "train.steps=3", "train.save_every=1"),
    *("train.keep_checkpoints=9", "eval.problems=2", "eval.n=1", "eval.k=[1]", "selection=clip_b", "optim.lr=1e-3"),
)

Results = dict[str, Tensor]


# --- in the spawned processes -------------------------------------------------------------------------------------


def _critic(layout: Layout, model_dir: Path, dtype: str, optimizer: str) -> Critic:
    from megatron_ext.learner.critic import Critic

    config = cases.make_config(layout, dtype, OptimConfig(optimizer=optimizer, lr=9.0, warmup_steps=8, decay="linear"))
    if optimizer == "sgd":
        config.optim.warmup_steps, config.optim.decay = 0, "constant"
    config.critic.lr, config.critic.clip_grad, config.critic.clip_range = LR, 1e9, CLIP_RANGE
    return Critic(config, model_dir, total_updates=20)


def _targets(batch: TrainBatch, values_T: Tensor) -> tuple[Tensor, Tensor]:
    """Returns, and old values from which some current values differ by more than the clipping range."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(2, len(batch.seq_ids), generator=generator, dtype=torch.float64)
    return noise[0], values_T.double() + 0.5 * noise[1]


def _update(critic: Critic, batch: TrainBatch) -> dict[str, float]:
    returns_T, old_T = _targets(batch, critic.values(batch))
    return critic.update(batch, MINI, cases.aggregation_weights("token_mean", MINI), returns_T, old_T)


def _weights(critic: Critic) -> Results:
    """All full weights on rank 0, under the policy's names, and the head, which the last rank always holds."""
    from megatron_ext.learner import weights
    from megatron_ext.learner.value_head import WEIGHT

    out = {name: tensor.double().clone() for name, tensor in weights.export_hf(critic.hf, critic.chunks)}
    mine = weights.named_parameters(critic.chunks).get(WEIGHT)
    head = torch.zeros(1, 32, dtype=torch.float64) if mine is None else mine.detach().double().clone()
    torch.distributed.broadcast(head, src=torch.distributed.get_world_size() - 1)
    return {**out, "head": head}


def _layout(layout: Layout, model_dir: Path) -> Results:
    from megatron_ext.learner import weights
    from megatron_ext.learner.value_head import WEIGHT

    batch = cases.make_batch(torch.float64)
    critic = _critic(layout, model_dir, "float64", "sgd")
    assert not critic.values(batch).any(), "it starts at 0"
    if (head := weights.named_parameters(critic.chunks).get(WEIGHT)) is not None:
        head.data.copy_(HEAD)
    out = {"values": critic.values(batch)}
    before = _weights(critic)
    metrics = _update(critic, batch)
    out |= {f"metric/{name}": torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    out |= {f"gradient/{name}": (before[name] - after) / LR for name, after in _weights(critic).items()}
    out["values after"] = critic.values(batch)
    every = [torch.empty_like(out["values"]) for _ in range(layout.world)]
    torch.distributed.all_gather(every, out["values"].contiguous())
    assert all(torch.equal(values, every[0]) for values in every), "every rank has the same values"
    return out


def _resume(layout: Layout, root: Path, dtype: str) -> dict[str, Any]:
    """Two updates, save, two more; and the same from the checkpoint, with fresh models."""
    from megatron_ext.learner import checkpoint
    from megatron_ext.learner.learner import Learner

    batch, place = cases.make_batch(torch.float32), root / f"saved-{layout.name}"

    def fresh() -> tuple[Learner, Critic]:
        critic = _critic(layout, root / "model", dtype, "adam")
        return Learner(critic.config, root / "model", total_updates=20), critic

    def go_on(critic: Critic) -> list[list[float]]:
        metrics = [_update(critic, batch) for _ in range(2)]
        return [[*m.values()] for m in metrics] + [critic.values(batch).tolist()]

    learner, critic = fresh()
    start = go_on(critic)
    directory = checkpoint.save(learner, place, 2, {}, critic=critic)
    going_on = go_on(critic)
    learner, critic = fresh()
    checkpoint.load(learner, directory, critic=critic)
    resumed = go_on(critic)
    said = []
    for change in (lambda: checkpoint.load(learner, directory), lambda: _without_critic(learner, directory, critic)):
        try:
            change()
        except ValueError as error:
            said.append(str(error))
    head = [str(p.dtype) for n, p in critic.chunks[0].named_parameters() if n.endswith("output_layer.weight")]
    return {"start": start, "going on": going_on, "resumed": resumed, "refused": said, "head": head}


def _without_critic(learner: Any, directory: Path, critic: Critic) -> None:
    from megatron_ext.learner import checkpoint

    plain = checkpoint.save(learner, directory.parent.with_name(directory.parent.name + "-plain"), 3, {})
    checkpoint.load(learner, plain, critic=critic)


def _runs(root: Path) -> None:
    """Run live, replay the run, and resume it from its first checkpoint, all in this process."""
    from recipes.launch import launch
    from recipes.loop.run_dir import RunDir
    from recipes.models.prepare import make_tiny_model
    from recipes.train import train

    RunDir._report = lambda self: self.path / "report.html"  # type: ignore[method-assign]
    model = make_tiny_model(root / "tiny", seed=0)

    def run(name: str, *extra: str) -> None:
        words = [f"model.path={model}", f"run.dir={root / name}", *RUN, *extra]
        assert launch(train, words) == 0, name

    run("live")
    run("replay", f"rollout.replay={root / 'live'}")
    shutil.copytree(root / "live", root / "again", symlinks=True)
    (root / "again" / "checkpoints" / "latest").write_text("step_000001\n")
    run("again")


def _process(rank: int, root: Path) -> None:
    from configs.schema import ParallelConfig
    from megatron_ext.learner.model import distributed

    for layout in (ONE, *LAYOUTS, DP2_SHARDED):
        if rank < layout.world:
            with gloo.group(rank, layout.world, root / f"store-{layout.name}"):
                with distributed(ParallelConfig(**layout.parallel), seed=1):  # type: ignore[arg-type]
                    if layout != DP2_SHARDED:
                        results = _layout(layout, root / "model")
                        if rank == 0:
                            save_file({k: v.contiguous() for k, v in results.items()}, root / layout.name)
                    if layout in (PP2, DP2_SHARDED):
                        resumed = _resume(layout, root, "bfloat16" if layout == DP2_SHARDED else "float32")
                        (root / f"resume-{layout.name}-{rank}.json").write_text(json.dumps(resumed))
    if rank == 0:
        _runs(root)


# --- the tests ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("critic")
    cases.make_model(root / "model")
    gloo.run(4, _process, root, timeout_s=300)
    return root


def test_values_and_gradients_of_one_process_are_those_of_transformers(root: Path) -> None:
    """transformers computes its norms in float32 whatever the model's type, hence the tolerance."""
    from transformers import AutoModelForCausalLM

    results, batch = load_file(root / "one"), cases.make_batch(torch.float64)
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64)
    head = HEAD.clone().requires_grad_()
    values = []
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        hidden = model.model(torch.tensor([prompt + response])).last_hidden_state[0]
        values.append((hidden[len(prompt) - 1 : -1] @ head.T)[:, 0])  # of the state before each response token
    got = torch.cat(values)
    torch.testing.assert_close(results["values"], got.detach(), rtol=1e-5, atol=1e-5)
    returns, old = _targets(batch, got.detach())
    bounded = old + (got - old).clamp(-CLIP_RANGE, CLIP_RANGE)
    loss = torch.maximum((got - returns) ** 2, (bounded - returns) ** 2) / 2
    trained = torch.isin(batch.seq_ids, torch.tensor(MINI)) & batch.mask
    objective = loss[trained].mean()
    objective.backward()
    assert float(results["metric/value_loss"]) == pytest.approx(objective.item(), rel=1e-5)
    assert 0.05 < float(results["metric/value_clipfrac"]) < 0.8
    torch.testing.assert_close(results["gradient/head"], head.grad, rtol=1e-4, atol=1e-5)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = {n.removeprefix("gradient/") for n in results if n.startswith("gradient/")}
    assert names == {*expected, "head"}
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert float((results[f"gradient/{name}"] - gradient).abs().max()) < 1e-4 * scale, name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_agree_in_float64(root: Path, layout: Layout) -> None:
    """The norm is computed by Megatron in float32."""
    got, expected = load_file(root / layout.name), load_file(root / "one")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        limit = 1e-6 if name == "metric/grad_norm" else 1e-10
        assert float((got[name] - tensor).abs().max()) <= limit * max(1.0, float(tensor.abs().max())), name


@pytest.mark.parametrize("layout", (ONE, *LAYOUTS), ids=lambda layout: layout.name)
def test_the_norm_counts_every_gradient_once(root: Path, layout: Layout) -> None:
    results = load_file(root / layout.name)
    gradient = torch.cat([value.flatten() for name, value in results.items() if name.startswith("gradient/")])
    assert float(results["metric/grad_norm"]) == pytest.approx(float(gradient.norm()), rel=1e-6)


@pytest.mark.parametrize("layout", (PP2, DP2_SHARDED), ids=lambda layout: layout.name)
def test_resume_is_exact(root: Path, layout: Layout) -> None:
    for rank in range(layout.world):
        seen = json.loads((root / f"resume-{layout.name}-{rank}.json").read_text())
        assert seen["resumed"] == seen["going on"] != seen["start"]
        assert "with a critic: set advantage.name=gae" in seen["refused"][0]
        assert "without a critic: do not set advantage.name=gae" in seen["refused"][1]
        assert set(seen["head"]) <= {"torch.float32"}, "under bfloat16 too"


def _metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))} for row in rows]


def test_a_run_trains_the_critic_and_after_its_warm_up_the_policy(root: Path) -> None:
    rows = _metrics(root / "live")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["critic/value_loss"] > 0 and row["critic/grad_norm"] > 0 and row["critic/lr"] == 1e-2
        assert row["critic/explained_variance"] <= 1
    assert rows[0]["critic/values_mean"] == 0 != rows[1]["critic/values_mean"]
    assert ["actor/grad_norm" in row for row in rows] == [False, True, True]
    samples = [json.loads(line) for line in (root / "live" / "samples.jsonl").read_text().splitlines()]
    assert len({sample["advantage"] for sample in samples}) > 2


@pytest.mark.parametrize("name", ["replay", "again"])
def test_replayed_and_resumed_runs_are_the_same_bit_for_bit(root: Path, name: str) -> None:
    assert _metrics(root / name) == _metrics(root / "live")
    weights = [load_file(root / run / "hf" / "model.safetensors") for run in (name, "live")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
