"""The bench: exact accuracy against samples, gradients against the project's objective, disjoint seeds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_ext.rl.losses import build_loss
from megatron_ext.rl.objective import Coefficients, evaluate
from megatron_ext.rl.types import LossInputs
from recipes.studies import chain, policies, results
from recipes.studies.engine import MAX_GRAD_NORM, Method, Setting, clip_norms, train
from recipes.studies.methods import LOSSES
from recipes.studies.policies import Network, Table, log_softmax, warm_started

SMALL = Setting(steps=3, prompts=4, mini_batches=4)


def test_exact_accuracy_is_the_share_of_right_samples() -> None:
    seeds = [0, 1]
    logp = log_softmax(chain.start_logits(seeds))
    draws = chain.Draws(seeds)
    prompts = draws.prompts(8).repeat_interleave(4000, 1)
    _, choice = chain.sample(logp, prompts, draws.uniform(32_000, chain.TOKENS))
    sampled = (choice[..., -1] == chain.answers(prompts)).double().view(2, 8, 4000).mean(2)
    exact = chain.solve_probability(logp, prompts[:, ::4000]).double()
    assert (sampled - exact).abs().max() < 5 * (0.25 / 4000) ** 0.5
    assert 0.15 < float(exact.mean()) < 0.35


def test_answers_are_arithmetic() -> None:
    #                        7 + 3 = 0, 0 * 4 = 0, 0 - 2 = 8
    prompt = torch.tensor([[7, 0, 3, 2, 4, 1, 2]])
    assert chain.answers(prompt).tolist() == [8]


def test_log_softmax_is_torchs() -> None:
    z = torch.randn(5, 7, 10, dtype=torch.float64) * 20
    torch.testing.assert_close(log_softmax(z), z.log_softmax(-1))


@pytest.fixture
def short_warm_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "WARM_STEPS", 30)


@pytest.mark.parametrize(
    ("level", "name"),
    [
        *[("L1", n) for n in ("GRPO", "CE-GPPO (1, 0.5)", "OD", "Clip_B 1", "KL-Cov", "unlikely 0.25", "BAPO")],
        ("L2", "GRPO"),
    ],
)
def test_a_seed_does_not_depend_on_its_neighbours(name: str, level: str, short_warm_start: None) -> None:
    setting = replace(SMALL, level=level, lr=0.05 if level == "L1" else 0.001)
    together = train(setting, LOSSES[name], [3, 4, 5])
    alone = train(setting, LOSSES[name], [4])
    for key, values in alone.items():
        torch.testing.assert_close(together[key][1:2], values, rtol=1e-3, atol=2e-3, equal_nan=True, msg=key)
    assert not torch.equal(together["entropy"][0], together["entropy"][1])


class _Recorder(Table):
    """A table that records its first gradient."""

    first: tuple[Tensor, Tensor] | None = None

    def backward(self, gradient: Tensor) -> list[Tensor]:
        found = super().backward(gradient)
        if _Recorder.first is None:
            _Recorder.first = self.parameters[0].clone(), found[0].clone()
        return found


@pytest.mark.parametrize("name", ["GRPO", "KL-Cov", "entropy bonus 0.003", "Clip_B 1"])
def test_the_update_is_the_gradient_of_the_projects_objective(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first update's gradient is recomputed from its batch with `megatron_ext.rl.objective.evaluate`."""
    from recipes.studies import engine

    method, seen = LOSSES[name], []
    _Recorder.first = None
    monkeypatch.setattr(engine, "start", lambda setting, seeds: _Recorder(chain.start_logits(seeds)))
    update = engine._Training._update

    def spy(self: engine._Training, mini: engine._Batch, losses: object) -> dict[str, Tensor]:
        seen.append(mini)
        return update(self, mini, losses)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._Training, "_update", spy)
    train(replace(SMALL, steps=1, mini_batches=1), method, [7])
    assert _Recorder.first is not None
    table, found = _Recorder.first
    mini = seen[0]
    z = table[0].clone().requires_grad_()
    logp_KV = z.log_softmax(-1)
    context, choice = mini.context[0].flatten(), mini.choice[0].flatten()
    x = LossInputs(
        logp=logp_KV[context, choice],
        old_logp=mini.old_logp[0].flatten(),
        advantages=mini.advantage[0].flatten(),
        mask=torch.ones(len(context), dtype=torch.bool),
        seq_ids=torch.arange(len(context)) // chain.TOKENS,
        entropy=-(logp_KV.exp() * logp_KV).sum(-1)[context],
    )
    coefficients = Coefficients(
        weight=torch.full((len(context),), 1 / len(context)),
        keep=mini.keep[0].flatten(),
        kl_coef=mini.kl_coef[0].flatten(),
        entropy_coef=mini.entropy_coef[0].flatten(),
    )
    loss = build_loss(**method.loss)
    (expected,) = torch.autograd.grad(evaluate(loss, x, coefficients).total, z)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-7)
    assert expected.abs().max() > 1e-4


def test_the_networks_gradient_is_autograds() -> None:
    network = Network([0, 1], width=8)
    contexts = torch.tensor([[0, 5, 301, 305], [299, 5, 300, 312]])
    pull = torch.randn(2, 4, chain.CHOICES, generator=torch.Generator().manual_seed(0))
    network.rows(contexts)
    found = network.backward(pull)
    eps, parameter = 1e-2, network.parameters[1]
    before = (network.rows(contexts).double() * pull).sum()
    parameter[1, 0, 0] += eps
    slope = ((network.rows(contexts).double() * pull).sum() - before) / eps
    assert float(slope) == pytest.approx(float(found[1][1, 0, 0]), rel=0.05, abs=1e-3)
    assert float(network.table()[0, 300, 9]) == chain.NEVER


def test_a_warm_start_reaches_its_table() -> None:
    seeds = [0]
    fitted = warm_started(seeds).table().softmax(-1)
    assert float((fitted - chain.start_logits(seeds).softmax(-1)).abs().mean()) < 5e-3


@pytest.mark.parametrize(("level", "lr"), [("L1", 0.01), ("L2", 1e-4)])
def test_small_steps_change_entropy_as_predicted(level: str, lr: float, short_warm_start: None) -> None:
    """<grad H, step> is the measured change to first order, whatever the optimizer; under SGD it is eta <grad H, g>."""
    for optimizer in ("sgd", "adam"):
        setting = replace(SMALL, level=level, lr=lr if optimizer == "sgd" else lr / 30, optimizer=optimizer)
        curves = {k: v[:, 1:] for k, v in train(setting, Method(loss={"name": "ppo"}), [0, 1], probe="entropy").items()}
        scale = curves["measured"].abs().mean()
        assert (curves["predicted_step"] - curves["measured"]).abs().mean() < 0.1 * scale + 2e-7
        if optimizer == "adam":  # without momentum it is the step
            alone = train(replace(setting, betas=(0.0, 0.95)), Method(loss={"name": "ppo"}), [0, 1], probe="entropy")
            torch.testing.assert_close(
                alone["predicted_adam"], alone["predicted_step"], rtol=2e-2, atol=1e-6, equal_nan=True
            )
        if optimizer == "sgd":
            torch.testing.assert_close(curves["predicted_gradient"], curves["predicted_step"], rtol=1e-2, atol=1e-6)


def test_gradient_norms_are_clipped_per_seed() -> None:
    first, second = torch.tensor([[30.0, 0.0], [0.3, 0.0]]), torch.tensor([[40.0], [0.4]])
    a, b = clip_norms([first, second])
    assert a[:, 0].tolist() == pytest.approx([0.6 * MAX_GRAD_NORM, 0.3])
    assert b[:, 0].tolist() == pytest.approx([0.8 * MAX_GRAD_NORM, 0.4])


def test_passes_add_up_to_the_step() -> None:
    """Gains of the passes sum to the change of accuracy; before any update the clip leaves both sides whole."""
    setting = replace(SMALL, steps=2, mini_batches=2, epochs=3)
    curves = train(setting, LOSSES["GRPO"], [0, 1], probe="passes")
    gains = sum(curves[f"pass_gain_{number}"][:, 1:] for number in (1, 2, 3))
    torch.testing.assert_close(gains, curves["avg"].diff(dim=1), rtol=1e-4, atol=1e-6)
    kept = curves["pass_reward_1"] + curves["pass_penalty_1"]
    assert kept[:, 1:].abs().max() < 0.05  # advantages of a group sum to zero, and so do their gradients near r = 1
    assert "pass_gain_4" not in curves
    row = results.per_pass({k: v[0] for k, v in curves.items() if k.startswith("pass_")})
    assert len(row["pass_step"]) == 3 and min(row["pass_step"]) > 0
