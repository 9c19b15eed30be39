"""Routing replay: the learner sends tokens to the experts that the engine chose. Layouts: see the invariance matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gloo
import learner_cases as cases
import pytest
import torch
from torch import Tensor

from configs.schema import OptimConfig

PROMPTS, N, MAX_TOKENS = 8, 4, 24


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("replay")
    cases.make_moe_model(root / "model")
    gloo.run(1, _measure, root, timeout_s=120)
    return torch.load(root / "results.pt", weights_only=True)


def _measure(rank: int, root: Path) -> None:
    from configs.schema import ParallelConfig
    from megatron_ext.learner.model import distributed

    with gloo.group(rank, 1, root / "store"), distributed(ParallelConfig(), seed=1):
        torch.save(_replayed_updates(root / "model") | _against_the_engine(root / "model"), root / "results.pt")


def _replayed_updates(model_dir: Path) -> dict[str, Any]:
    """Statistics and gradients: without replay, with the router's own choice, another one, and three recomputations."""
    from megatron_ext.learner.learner import Learner
    from megatron_ext.rl.losses import build_loss

    results: dict[str, Any] = {}
    order = range(len(cases.LENGTHS))
    own: list[Tensor] | None = None
    other = cases.make_experts(order, layers=2)
    runs = {"free": (False, []), "own": (False, []), "other": (False, []), "other, full": (True, [])}
    for name, (recompute, modules) in (runs | {"other, moe": (True, ["moe"])}).items():
        config = cases.make_config(cases.ONE, "float32", OptimConfig(lr=0.0, clip_grad=1e9))
        config.model.recompute, config.model.recompute_modules = recompute, modules
        learner = Learner(config, model_dir, total_updates=9)
        batch = cases.make_batch(torch.float32)
        if own is None:
            own = _own_experts(learner, batch)
        batch.experts = {"free": None, "own": own}.get(name, other)
        stats = learner.statistics(batch)
        batch.old_logp = stats.logp + batch.old_logp
        learner.update(batch, order, cases.aggregation_weights("token_mean", order), build_loss("ce_gppo"))
        gradient = [buffer.grad_data.clone() for chunk in learner.chunks for buffer in chunk.buffers]
        results[name] = {"statistics": cases.stack(stats), "gradient": torch.cat(gradient)}
    with pytest.raises(ValueError, match=r"experts of shape \(\d+, 1, 2\), and the model needs \(\d+, 2, 2\)"):
        batch.experts = cases.make_experts(order, layers=1)
        learner.statistics(batch)
    return results


def _own_experts(learner: Any, batch: Any) -> list[Tensor]:
    """The experts that the learner's routers choose, one sample at a time."""
    from megatron.core.transformer.moe.router import TopKRouter

    routers = [module for chunk in learner.chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
    found: list[Tensor] = []
    hooks = [router.register_forward_hook(lambda _, __, output: found.append(output[1])) for router in routers]
    chosen = []
    for sample in range(len(batch.prompts)):
        found.clear()
        learner.statistics(batch, [sample])
        maps = torch.stack(found, dim=1)  # (tokens, layers, experts)
        chosen.append(maps.nonzero()[:, 2].view(*maps.shape[:2], -1).to(torch.uint8))
    for hook in hooks:
        hook.remove()
    return chosen


def _against_the_engine(model_dir: Path) -> dict[str, Any]:
    """A bfloat16 learner against the float32 local engine on the engine's own samples."""
    from megatron_ext.learner.learner import Learner
    from recipes.loop.batch import make_batch
    from recipes.rollout.engine import Sampling
    from recipes.rollout.local import LocalEngine

    config = cases.make_config(cases.ONE, "bfloat16", OptimConfig(), micro_batch_tokens=256)
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    engine = LocalEngine(model_dir, max_model_len=64, max_num_seqs=8)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, cases.VOCAB, (3 + i % 4,), generator=generator).tolist() for i in range(PROMPTS)]
    sampling = Sampling(MAX_TOKENS, experts=True)
    rollouts = engine.generate(prompts, n=N, sampling=sampling, seeds=list(range(PROMPTS)))
    samples = [_sample(rollout, number) for number, rollout in enumerate(rollouts)]
    sampled = torch.cat([torch.tensor(rollout.logprobs) for rollout in rollouts])
    learner = Learner(config, model_dir, total_updates=1)
    results = {}
    for replay in (None, False):
        config.rollout.routing_replay = replay
        batch, _, _ = make_batch(config, samples)
        results[f"dlogp {replay}"] = learner.statistics(batch).logp - sampled
    results["lengths"] = torch.tensor([len(rollout.response_ids) for rollout in rollouts])
    return results


def _sample(rollout: Any, number: int) -> Any:
    from megatron_ext.rl.types import Sample

    return Sample(rollout, "p", number // N, number)


def test_replay_of_the_own_choice_changes_nothing(results: dict[str, Any]) -> None:
    """Bit for bit, although the order of a token's experts differs."""
    for what in ("statistics", "gradient"):
        torch.testing.assert_close(results["own"][what], results["free"][what], rtol=0, atol=1e-6)


def test_replay_decides_on_the_experts(results: dict[str, Any]) -> None:
    moved = (results["other"]["statistics"][0] - results["free"]["statistics"][0]).abs()
    assert moved.mean() > 0.1


@pytest.mark.parametrize("name", ["other, full", "other, moe"])
def test_recomputation_in_backward_replays_the_micro_batch_of_its_forward_pass(
    results: dict[str, Any], name: str
) -> None:
    for what in ("statistics", "gradient"):
        assert torch.equal(results[name][what], results["other"][what])


def test_replay_takes_the_outliers_out_of_the_mismatch(results: dict[str, Any]) -> None:
    """Only rounding to bfloat16 remains; no token is routed to other experts."""
    with_replay, without = results["dlogp None"], results["dlogp False"]
    k3 = [float((d.exp() - 1 - d).mean()) for d in (with_replay, without)]
    assert float(with_replay.abs().max()) < float(without.abs().max()) / 3
    assert k3[0] < k3[1] / 3
    assert len(set(results["lengths"].tolist())) > 1, "rows end at different steps"
