"""The adapter on a stand-in that mimics NeMo-Aligner's PPO actor: same methods, signatures, batch keys, reductions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.integrations.nemo_aligner import actor_class
from megatron_ext.integrations.padded import loss_inputs
from megatron_ext.rl.losses import build_loss

B, S, V = 4, 6, 11


class UpstreamActor:
    """The parts of `MegatronGPTActorModel` that the adapter uses; its own loss must not be called."""

    def __init__(self, micro_batch_size: int = B, entropy_bonus: float = 0.0) -> None:
        self.cfg = SimpleNamespace(micro_batch_size=micro_batch_size)
        self.entropy_bonus, self.ratio_eps = entropy_bonus, 0.2

    def get_actor_forward_output_and_loss_func(self) -> Callable[..., Any]:
        def fwd_output_and_loss_func(data_iterator: Iterator[Any], model: Any) -> Any:
            batch = next(data_iterator)
            logits = model(batch["response_tokens"], batch["position_ids"], batch["attention_mask"], labels=None)

            def loss_func(parallel_logits: Tensor) -> Any:
                raise AssertionError("upstream's own loss")

            return logits, loss_func

        return fwd_output_and_loss_func

    def get_loss_and_metrics(self, batch: dict[str, Any], forward_only: bool) -> tuple[float, dict[str, float]]:
        rows = len(batch["response_tokens"])
        batch |= {"position_ids": torch.arange(S).expand(rows, -1), "attention_mask": torch.ones(rows, 1, S, S)}
        size = self.cfg.micro_batch_size
        pieces = [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, rows, size)]
        step, iterator, reduced = self.get_actor_forward_output_and_loss_func(), iter(pieces), []
        for _ in pieces:  # Megatron's schedule without pipelining
            output, loss_func = step(iterator, self.model)
            loss, metrics = loss_func(output)
            (loss / len(pieces)).backward()
            reduced.append(metrics)
        names = ("loss", "ppo_ratio", "ppo_ratio_clamped", "scaled_entropy")
        return 0.0, {name: torch.stack([entry[name] for entry in reduced]).mean().item() for name in names}


def from_parallel_logits_to_logprobs(
    vocab_parallel_logits: Tensor, target: Tensor, inference_only: bool = False, higher_stability: bool = False
) -> Tensor:
    """(B, S, V) logits and unshifted targets -> (B, S-1), as documented upstream."""
    logp = vocab_parallel_logits.log_softmax(-1)[:, :-1]
    return logp.gather(-1, target[:, 1:, None]).squeeze(-1)


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Modules under NeMo-Aligner's names, and a process group of one."""
    names = ("", ".utils", ".utils.distributed", ".models", ".models.nlp", ".models.nlp.gpt")
    modules = {f"nemo_aligner{n}": ModuleType(f"nemo_aligner{n}") for n in names}
    actor = modules["nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor"] = ModuleType("actor")
    actor.MegatronGPTActorModel = UpstreamActor  # type: ignore[attr-defined]
    state = SimpleNamespace(get_data_parallel_group=lambda: dist.group.WORLD)
    modules["nemo_aligner.utils"].parallel_state = state  # type: ignore[attr-defined]
    distributed = modules["nemo_aligner.utils.distributed"]
    distributed.from_parallel_logits_to_logprobs = from_parallel_logits_to_logprobs  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(B, S - 1)
    for row, (start, stop) in enumerate([(1, 5), (2, 3), (0, 4), (3, 5)]):
        mask[row, start:stop] = 1
    return {
        "response_tokens": torch.randint(V, (B, S), generator=generator),
        "advantages": torch.randn(B, S - 1, generator=generator).double(),
        "mask": mask,
        "prev_logprobs": -torch.rand(B, S - 1, generator=generator).double() * 4,
        "is_end": torch.tensor([1.0, 1.0, 0.0, 1.0]),
    }


LOSSES: dict[str, dict[str, Any]] = {
    "ce_gppo": {"beta1": 0.5, "beta2": 1.0, "eps_low": 0.2, "eps_high": 0.2},
    "gspo": {},
    "ppo": {"eps_low": 0.2, "eps_high": 0.28},
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_gradient_is_that_of_the_token_mean_over_the_global_batch(
    upstream: None, name: str, micro_batch_size: int
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(B, S, V, dtype=torch.float64, requires_grad=True)
    batch, loss = make_batch(), build_loss(name, **LOSSES[name])
    logp = from_parallel_logits_to_logprobs(logits, batch["response_tokens"])
    valid = (batch["mask"] * batch["is_end"][:, None]).bool()
    per_token = loss(loss_inputs(logp, batch["prev_logprobs"], batch["advantages"], valid)).loss
    expected_value = per_token[valid.reshape(-1)].mean()
    (expected,) = torch.autograd.grad(expected_value, logits)

    rows = iter(range(0, B, micro_batch_size))
    actor = actor_class(loss)(micro_batch_size)
    assert isinstance(actor, UpstreamActor)

    def model(tokens: Tensor, positions: Tensor, attention: Tensor, labels: None) -> Tensor:
        assert positions.shape == tokens.shape and attention.shape == (len(tokens), 1, S, S)
        start = next(rows)
        return logits[start : start + len(tokens)]

    actor.model = model
    _, metrics = actor.get_loss_and_metrics(batch, forward_only=False)
    assert logits.grad is not None and torch.allclose(logits.grad, expected, rtol=1e-6, atol=1e-9)
    assert expected.abs().max() > 1e-3 and not logits.grad[2].any()  # the third sequence did not end
    ratios = (logp - batch["prev_logprobs"]).exp()[valid]
    wanted = [expected_value, ratios.mean(), ratios.clamp(0.8, 1.2).mean(), 0.0]
    assert list(metrics) == ["loss", "ppo_ratio", "ppo_ratio_clamped", "scaled_entropy"]
    assert list(metrics.values()) == pytest.approx(
        [float(torch.as_tensor(value).detach()) for value in wanted], rel=1e-5
    )


def test_a_batch_without_valid_tokens_moves_nothing(upstream: None) -> None:
    logits = torch.randn(B, S, V, dtype=torch.float64, requires_grad=True)
    actor = actor_class(build_loss("ppo"))(B)
    actor.model = lambda *_, **__: logits
    _, metrics = actor.get_loss_and_metrics({**make_batch(), "is_end": torch.zeros(B)}, forward_only=False)
    assert logits.grad is not None and not logits.grad.any() and metrics["loss"] == 0


def test_an_entropy_bonus_that_would_do_nothing_is_refused(upstream: None) -> None:
    with pytest.raises(ValueError, match="model.ppo.entropy_bonus=0.01 is not used by this actor: set it to 0"):
        actor_class(build_loss("ppo"))(B, entropy_bonus=0.01)


def test_without_nemo_aligner_it_says_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nemo_aligner", None)
    with pytest.raises(ImportError, match="NeMo-Aligner is not installed: this adapter runs in its container"):
        actor_class(build_loss("ppo"))
