"""Padded tensors of other trainers, and the contract with verl and TRL where these are not installed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.integrations import trl, verl
from megatron_ext.integrations.padded import loss_inputs, select
from megatron_ext.rl.losses import build_loss
from megatron_ext.rl.selection import SELECTIONS, SelectionInputs, build_selection
from megatron_ext.rl.types import TokenStats

B, L = 5, 7
DOCS = Path(__file__).parents[3] / "docs" / "integrations.md"


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(L) < torch.randint(2, L + 1, (B, 1), generator=g)
    old = -2 * torch.rand(B, L, generator=g)
    return {
        "old": old,
        "logp": old + 0.4 * torch.randn(B, L, generator=g),
        "advantages": torch.randn(B, generator=g),
        "mask": mask,
        "entropy": torch.rand(B, L, generator=g),
    }


@pytest.mark.parametrize("name", ["ce_gppo", "gspo"])
def test_padding_changes_no_loss(name: str) -> None:
    """Rows of different lengths with garbage in the padding give the same numbers as the concatenated responses."""
    t, loss = tensors(), build_loss(name)
    rubbish = torch.where(t["mask"], t["logp"], float("nan"))
    padded = loss(loss_inputs(rubbish, t["old"], t["advantages"], t["mask"])).loss.view(B, L)
    flat = loss_inputs(t["logp"], t["old"], t["advantages"], t["mask"])
    kept = flat.mask
    assert flat.seq_ids is not None
    short = loss_inputs(t["logp"], t["old"], t["advantages"].unsqueeze(1), t["mask"])
    packed = loss(
        type(flat)(flat.logp[kept], flat.old_logp[kept], short.advantages[kept], kept[kept], flat.seq_ids[kept])
    )
    assert torch.equal(padded[t["mask"]], packed.loss) and (padded[~t["mask"]] == 0).all()


@pytest.mark.parametrize("name", ["clip_b", "forking", "kl_cov", "clip_cov"])
def test_selection_is_that_of_the_flat_batch(name: str) -> None:
    t, selection = tensors(), build_selection(name, **({} if name == "clip_b" else {"frac": 0.3}))
    out = select(
        selection, logp_BL=t["logp"], entropy_BL=t["entropy"], advantages=t["advantages"], mask_BL=t["mask"],
        seed=1, step=2, first_row=10,
    )  # fmt: skip
    m = t["mask"]
    rows, columns = m.nonzero().T
    zeros = torch.zeros(len(rows))
    x = SelectionInputs(
        TokenStats(t["logp"][m], t["entropy"][m], zeros, zeros),
        t["advantages"][rows], m[m], rows + 10, columns, seed=1, step=2,
    )  # fmt: skip
    flat = selection.select(x)
    assert torch.equal(out.keep.view(B, L)[m], flat.keep) and torch.equal(out.kl_coef.view(B, L)[m], flat.kl_coef)


def test_what_a_trainer_lacks_is_named() -> None:
    t = tensors()
    for name in SELECTIONS:
        given: Any = {k: t[v] for k, v in (("logp_BL", "logp"), ("advantages", "advantages"), ("mask_BL", "mask"))}
        if build_selection(name).needs() - {"logp"}:
            with pytest.raises(ValueError, match="which this trainer does not provide"):
                select(build_selection(name), entropy_BL=None, seed=0, step=0, **given)
        else:
            select(build_selection(name), entropy_BL=None, seed=0, step=0, **given)


def test_the_policy_loss_keeps_to_verls_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for verl's registry and aggregation; the real ones: tests/integrations/test_verl.py."""
    registry: dict[str, Any] = {}
    module = ModuleType("verl.trainer.ppo.core_algos")
    module.register_policy_loss = lambda name: lambda fn: registry.setdefault(name, fn)  # type: ignore[attr-defined]
    module.agg_loss = lambda loss_mat, loss_mask, loss_agg_mode, batch_num_tokens=None: (  # type: ignore[attr-defined]
        (loss_mat * loss_mask).sum() / (batch_num_tokens or loss_mask.sum())
    )
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    loss, t = build_loss("ppo"), tensors()
    verl.register("ours", loss, kl_cov_coef=0.5)
    weights = torch.ones(B, L)
    weights[0, 0], weights[1, 1] = 0.0, -1.0
    logp = t["logp"].clone().requires_grad_()
    total, metrics = registry["ours"](
        old_log_prob=t["old"], log_prob=logp, advantages=t["advantages"].unsqueeze(1), response_mask=t["mask"],
        loss_agg_mode="token-mean", config=SimpleNamespace(global_batch_info={"batch_num_tokens": 100}),
        rollout_is_weights=weights,
    )  # fmt: skip
    per_token = loss(loss_inputs(t["logp"], t["old"], t["advantages"], t["mask"])).loss.view(B, L)
    expected = per_token.sum() - per_token[0, 0] + 0.5 * (t["logp"] - t["old"])[1, 1].abs()
    torch.testing.assert_close(total.detach(), expected / 100)
    total.backward()
    assert logp.grad is not None and logp.grad[0, 0] == 0
    assert set(metrics) >= {"actor/pg_clipfrac_low", "actor/ppo_kl"} and all(
        isinstance(v, float) for v in metrics.values()
    )


def test_without_the_trainers_the_import_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("trl", "verl"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="trl"):
        trl.trainer_class(build_loss("ppo"))
    with pytest.raises(ImportError, match="verl"):
        verl.register("ours", build_loss("ppo"))


def test_the_ten_lines_of_the_docs_run() -> None:
    (code, *_) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.S)
    exec(code, {})


def test_verl_refuses_rules_on_the_forward_pass_and_weighs_tokens() -> None:
    t = tensors()
    batch = SimpleNamespace(
        batch={"old_log_probs": t["logp"], "response_mask": t["mask"], "advantages": t["advantages"]}
    )
    for name, also in (("entropy_ratio", []), ("none", [{"name": "region", "region": "e2"}])):
        with pytest.raises(ValueError, match="every forward pass"):
            verl.select(batch, build_selection(name, also=also))
    verl.select(batch, build_selection("steer", weight_min=0.5), entropies=t["entropy"])
    weights = batch.batch["rollout_is_weights"][t["mask"]]
    assert weights.min().item() == pytest.approx(0.5) and 0.5 < weights.mean() < weights.max() <= 1
