"""Our losses inside SkyRL, with skyrl-train's own registry and reductions, on a CPU: `make test-integrations`.

Not run: Ray, to whose actor SkyRL copies the registry, the FSDP and Megatron workers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor

pytest.importorskip("skyrl_train")
from skyrl_train.utils.ppo_utils import PolicyLossRegistry, ppo_policy_loss  # noqa: E402

from megatron_ext.integrations.skyrl import register  # noqa: E402
from megatron_ext.rl.losses import build_loss  # noqa: E402

REDUCTIONS = ["token_mean", "sequence_mean", "seq_mean_token_sum_norm"]


def config(reduction: str, **changes: Any) -> Any:
    values = {"policy_loss_type": "dual_clip", "eps_clip_low": 0.2, "eps_clip_high": 0.28, "clip_ratio_c": 3.0}
    values |= {"use_tis": False, "tis_imp_ratio_cap": 1.3, "loss_reduction": reduction, "max_seq_len": 20}
    return SimpleNamespace(**{**values, **changes})


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logp, old, rollout = (-2 * torch.rand(6, 9, generator=g) for _ in range(3))
    mask = (torch.arange(9) < torch.randint(2, 10, (6, 1), generator=g)).float()
    return logp, old, rollout, torch.randn(6, 1, generator=g).expand(6, 9), mask


@pytest.mark.parametrize("tis", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_where_both_have_the_loss_they_agree(reduction: str, tis: bool) -> None:
    """Value, gradient and clip fraction of PPO with dual clip; also after the pickling for a worker."""
    name = f"ours/{reduction}/{tis}"
    register(name, build_loss("ppo", eps_low=0.2, eps_high=0.28, dual_clip=3.0))
    ours = cloudpickle.loads(cloudpickle.dumps(PolicyLossRegistry.get(name)))
    logp, old, rollout, a, mask = tensors()
    results = []
    for fn in (ppo_policy_loss, ours):
        leaf = logp.clone().requires_grad_()
        total, clipped = fn(leaf, old, a, config(reduction, use_tis=tis), loss_mask=mask, rollout_logprobs=rollout)
        total.backward()
        results.append((total.detach(), leaf.grad, torch.tensor(clipped)))
    for theirs, got in zip(*(r[:2] for r in results), strict=True):
        torch.testing.assert_close(got, theirs)
    assert 0 < results[0][2] <= results[1][2]  # our metric counts the dual clip too


@pytest.mark.parametrize("name", ["ce_gppo", "gspo", "repo_r"])
def test_losses_that_skyrl_does_not_have(name: str) -> None:
    register(f"ours/{name}", build_loss(name))
    assert f"ours/{name}" in PolicyLossRegistry.list_available()
    logp, old, _, a, mask = tensors()
    leaf = logp.clone().requires_grad_()
    total, _ = PolicyLossRegistry.get(f"ours/{name}")(leaf, old, a, config("token_mean"), loss_mask=mask)
    total.backward()
    assert torch.isfinite(total) and leaf.grad.abs().sum() > 0 and not leaf.grad[mask == 0].any()
