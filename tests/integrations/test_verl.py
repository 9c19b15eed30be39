"""Our losses and selections inside verl, with verl's own classes, on a CPU: `make test-integrations`.

Run here: the policy-loss registry, the worker's `ppo_loss` with a real `ActorConfig` and tensors without padding, the
driver's `_update_actor` (its conversions included) with a stub for the worker group. Not run: Ray, the FSDP and
Megatron engines, which verl registers for cuda and npu only.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl")
from verl import DataProto  # noqa: E402
from verl.trainer.ppo.ray_trainer import RayPPOTrainer  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers.config import ActorConfig, FSDPActorConfig, PolicyLossConfig  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402
from verl.workers.utils.padding import left_right_2_no_padding  # noqa: E402

from megatron_ext.integrations.padded import loss_inputs  # noqa: E402
from megatron_ext.integrations.verl import register, select, trainer_class  # noqa: E402
from megatron_ext.rl.losses import build_loss  # noqa: E402
from megatron_ext.rl.selection import build_selection  # noqa: E402

B, P, L = 12, 4, 9


def batch(seed: int = 0) -> DataProto:
    """A batch of verl's driver: left-padded prompts, right-padded responses of random lengths."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.arange(P) >= torch.randint(0, P - 1, (B, 1), generator=g)
    response = torch.arange(L) < torch.randint(2, L + 1, (B, 1), generator=g)
    attention = torch.cat([prompt, response], dim=1).long()
    old = -3 * torch.rand(B, L, generator=g) * response
    advantages = torch.randn(B, 1, generator=g).expand(B, L) * response
    ids = torch.randint(1, 50, (B, P + L), generator=g)
    return DataProto.from_dict(
        {
            "input_ids": ids,
            "prompts": ids[:, :P],
            "responses": ids[:, P:],
            "attention_mask": attention,
            "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
            "response_mask": response.long(),
            "old_log_probs": old,
            "advantages": advantages,
        }
    )


def config(mode: str, **policy: Any) -> ActorConfig:
    return FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode=mode, **policy),
    )


def new_logp(data: DataProto, scale: float = 0.4) -> Tensor:
    g = torch.Generator().manual_seed(9)
    return data.batch["old_log_probs"] + scale * torch.randn(B, L, generator=g)


def gradient(data: DataProto, actor: ActorConfig, rows_per_micro_batch: int) -> Tensor:
    """d loss / d log-probabilities (B, L), from the worker's `ppo_loss` called once per micro-batch."""
    logp = new_logp(data).requires_grad_()
    tokens = int(data.batch["response_mask"].sum())
    for start in range(0, B, rows_per_micro_batch):
        rows = slice(start, min(start + rows_per_micro_batch, B))
        td = left_right_2_no_padding(data[rows].to_tensordict())
        tu.assign_non_tensor(td, dp_size=1, batch_num_tokens=tokens, global_batch_size=B)
        whole = torch.nn.functional.pad(logp[rows], (P - 1, 1))  # a position holds the token that it predicts
        attention = data.batch["attention_mask"][rows].bool()
        flat = [row[mask] for row, mask in zip(whole, attention, strict=True)]
        total, metrics = ppo_loss(actor, {"log_probs": torch.nested.as_nested_tensor(flat, layout=torch.jagged)}, td)
        assert "actor/pg_loss" in metrics
        total.backward()
    assert logp.grad is not None
    return logp.grad


@pytest.mark.parametrize("rows", [12, 5, 1])
@pytest.mark.parametrize(("name", "params"), [("ce_gppo", {"beta1": 0.5, "beta2": 1.0}), ("gspo", {}), ("sapo", {})])
def test_the_worker_computes_our_gradient_whatever_the_micro_batch(
    name: str, params: dict[str, Any], rows: int
) -> None:
    loss = build_loss(name, **params)
    register(f"ours_{name}", loss)
    data = batch()
    got = gradient(data, config(f"ours_{name}"), rows)
    logp = new_logp(data).requires_grad_()
    b = data.batch
    out = loss(loss_inputs(logp, b["old_log_probs"], b["advantages"], b["response_mask"]))
    (out.loss.sum() / b["response_mask"].sum()).backward()
    torch.testing.assert_close(got, logp.grad, rtol=1e-5, atol=1e-8)


def test_ppo_is_verls_own() -> None:
    """The same bounds and dual clip give the same gradient. Other differences come from the loss, not the adapter."""
    register("ours_ppo", build_loss("ppo", eps_low=0.2, eps_high=0.2, dual_clip=3.0))
    torch.testing.assert_close(
        gradient(batch(), config("ours_ppo"), 12), gradient(batch(), config("vanilla"), 12), rtol=1e-5, atol=1e-8
    )


def penalised(data: DataProto, rows: int, on: ActorConfig, off: ActorConfig) -> Tensor:
    """Mask of the tokens whose gradient the penalty changes, (B, L) bool."""
    return gradient(data, on, rows) != gradient(data, off, rows)


def test_kl_cov_picks_the_same_tokens_for_any_micro_batch() -> None:
    unclipped = build_loss("ppo", eps_low=1.0, eps_high=float("inf"))
    register("ours_penalised", unclipped, kl_cov_coef=1.0)
    register("ours_free", unclipped)
    picks = []
    for rows in (12, 5, 1):
        data = batch()
        select(data, build_selection("kl_cov", frac=0.05))
        picks.append(penalised(data, rows, config("ours_penalised"), config("ours_free")))
    assert int(picks[0].sum()) == int(0.05 * int(batch().batch["response_mask"].sum())) > 1
    assert torch.equal(picks[0], picks[1]) and torch.equal(picks[0], picks[2])


def test_verls_own_kl_cov_picks_others() -> None:
    """The reason for `select`. When this fails, verl has fixed its issue 7829."""
    on, off = (config("kl_cov", kl_cov_ratio=0.05, ppo_kl_coef=coef) for coef in (1.0, 0.0))
    whole, pieces = (penalised(batch(), rows, on, off) for rows in (12, 1))
    assert not torch.equal(whole, pieces)


def test_clip_b_drops_tokens_and_keeps_the_denominator() -> None:
    register("ours_ppo", build_loss("ppo"))
    data, entropies = batch(), torch.rand(B, L, generator=torch.Generator().manual_seed(1))
    metrics = select(data, build_selection("clip_b", mu_low=0.3), entropies=entropies)
    dropped = (data.batch["rollout_is_weights"] == 0) & data.batch["response_mask"].bool()
    assert 0 < int(dropped.sum()) and metrics["selection/dropped_frac"] == pytest.approx(
        float(dropped.sum() / data.batch["response_mask"].sum())
    )
    got, whole = gradient(data, config("ours_ppo"), 4), gradient(batch(), config("ours_ppo"), 4)
    assert (got[dropped] == 0).all() and torch.equal(got[~dropped], whole[~dropped])


def test_what_verl_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="needs entropy"):
        select(batch(), build_selection("clip_b"))
    with pytest.raises(ValueError, match="needs sum_p2, sum_p2_logp"):
        select(batch(), build_selection("clip_v"), entropies=torch.zeros(B, L))
    with pytest.raises(ValueError, match="entropy_coeff"):
        select(batch(), build_selection("entropy_bonus"))


def test_the_drivers_update_sends_the_decision_to_the_workers() -> None:
    """verl's real `_update_actor`, conversions included; the worker group records its input."""
    seen: list[Any] = []

    def update_actor(td: Any) -> Any:
        seen.append(td)
        return tu.get_tensordict({}, {"metrics": {"mfu": 0.1, "pg_loss": [1.0]}})

    trainer = object.__new__(trainer_class(build_selection("forking", frac=0.5), RayPPOTrainer))
    actor = SimpleNamespace(
        calculate_entropy=False,
        entropy_coeff=0.0,
        ppo_mini_batch_size=4,
        ppo_epochs=1,
        data_loader_seed=0,
        shuffle=False,
    )
    rollout = SimpleNamespace(multi_turn=SimpleNamespace(enable=False), temperature=1.0, n=1)

    class Config(SimpleNamespace):
        def get(self, name: str, default: Any = None) -> Any:
            return getattr(self, name, default)

    trainer.config = Config(actor_rollout_ref=SimpleNamespace(actor=actor, rollout=rollout))
    trainer.distillation_config, trainer.global_steps = None, 3
    trainer.actor_rollout_wg = SimpleNamespace(update_actor=update_actor)
    trainer._selection_entropies = torch.rand(B, L, generator=torch.Generator().manual_seed(2))
    data = batch()
    output = trainer._update_actor(data)
    (td,) = seen
    kept = sum(int((row > 0).sum()) for row in td["rollout_is_weights"].unbind())
    mask = data.batch["response_mask"].bool()
    assert kept == int((data.batch["rollout_is_weights"] * mask > 0).sum()) == int(0.5 * int(mask.sum()))
    assert output.meta_info["metrics"]["selection/dropped_frac"] == [pytest.approx(0.5, abs=0.02)]
