"""SkyRL and slime: contracts on stand-ins of their functions; SkyRL's real ones: tests/integrations/test_skyrl.py."""

from __future__ import annotations

import sys
from argparse import Namespace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.integrations import skyrl, slime
from megatron_ext.rl.losses import build_loss
from megatron_ext.rl.types import LossInputs

LENGTHS = [4, 2, 3]


def install(monkeypatch: pytest.MonkeyPatch, path: str, **contents: Any) -> None:
    """An empty package at ``path`` with these functions."""
    parts = path.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    module = ModuleType(path)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, path, module)


def test_the_policy_loss_keeps_to_skyrls_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: dict[str, Any] = {}
    install(
        monkeypatch,
        "skyrl_train.utils.ppo_utils",
        PolicyLossRegistry=SimpleNamespace(register=registry.__setitem__),
        reduce_loss=lambda loss, mask, reduction, longest: (loss * mask).sum() / mask.sum(),
    )
    g = torch.Generator().manual_seed(0)
    logp, old, rollout = (-3 * torch.rand(3, 5, generator=g) for _ in range(3))
    mask = (torch.rand(3, 5, generator=g) < 0.7).float()
    a = torch.randn(3, 1, generator=g).expand(3, 5)
    loss = build_loss("ce_gppo", beta1=0.5, beta2=1.0)
    skyrl.register("ours", loss)
    config = SimpleNamespace(use_tis=False, tis_imp_ratio_cap=1.5, loss_reduction="token_mean", max_seq_len=5)
    flat = [v.flatten() for v in (logp, old, a)]
    want = loss(LossInputs(*flat, mask.bool().flatten())).loss
    arguments: dict[str, Any] = {"loss_mask": mask, "rollout_logprobs": rollout}
    total, clipped = registry["ours"](logp, old, a, config=config, **arguments)
    torch.testing.assert_close(total, want.sum() / mask.sum())
    assert isinstance(clipped, float) and 0 < clipped < 1
    config.use_tis = True
    total, _ = registry["ours"](logp, old, a, config=config, **arguments)
    weight = (old - rollout).exp().clamp(max=1.5).flatten()
    torch.testing.assert_close(total, (want * weight).sum() / mask.sum())


def slime_case(monkeypatch: pytest.MonkeyPatch) -> tuple[Namespace, dict[str, Any], Tensor, Any]:
    """A micro-batch in slime's format: lists of one tensor per sample, logits (1, T, V) of the packed row."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(1, sum(LENGTHS), 6, generator=g, requires_grad=True)
    tokens = torch.randint(6, (sum(LENGTHS),), generator=g)

    def log_probs_and_entropy(logits: Tensor, **given: Any) -> tuple[None, dict[str, list[Tensor]]]:
        assert set(given) == {
            "args", "unconcat_tokens", "total_lengths", "response_lengths", "with_entropy", "top_p_token_ids"
        }  # fmt: skip
        all_logp = logits[0].log_softmax(-1)
        logp = all_logp.gather(1, tokens[:, None]).squeeze(1)
        entropy = -(all_logp.exp() * all_logp).sum(-1)
        return None, {"log_probs": list(logp.split(LENGTHS)), "entropy": list(entropy.split(LENGTHS))}

    install(
        monkeypatch,
        "slime.backends.megatron_utils.loss",
        get_log_probs_and_entropy=log_probs_and_entropy,
        get_rollout_top_p_logprob_kwargs=lambda args, batch: {"top_p_token_ids": None},
    )
    with torch.no_grad():
        logp = torch.cat(log_probs_and_entropy(logits, **dict.fromkeys((
            "args", "unconcat_tokens", "total_lengths", "response_lengths", "with_entropy", "top_p_token_ids"
        )))[1]["log_probs"])  # fmt: skip
    batch = {
        "unconcat_tokens": [], "total_lengths": LENGTHS, "response_lengths": LENGTHS,
        "log_probs": list((logp + 0.4 * torch.randn(len(logp), generator=g)).split(LENGTHS)),
        "advantages": list(torch.randn(3, generator=g).repeat_interleave(torch.tensor(LENGTHS)).split(LENGTHS)),
        "loss_masks": list((torch.arange(sum(LENGTHS)) != 1).int().split(LENGTHS)),
    }  # fmt: skip
    args = Namespace(use_rollout_logprobs=False, entropy_coef=0.1, context_parallel_size=1)

    def sum_of_sample_mean(values: Tensor) -> Tensor:
        pairs = zip(values.split(LENGTHS), batch["loss_masks"], strict=True)
        return torch.stack([(v * m).sum() / m.sum() for v, m in pairs]).sum()

    return args, batch, logits, sum_of_sample_mean


@pytest.mark.parametrize("name", ["ppo", "gspo", "entropy_shaped"])
def test_slimes_custom_loss_is_our_loss_under_its_reducer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, batch, logits, reduce = slime_case(monkeypatch)
    loss = build_loss(name)
    total, metrics = slime.loss_function(loss)(args, batch, logits, reduce)
    (got,) = torch.autograd.grad(total, logits)
    upstream = sys.modules["slime.backends.megatron_utils.loss"]
    keys = ("args", "unconcat_tokens", "total_lengths", "response_lengths", "with_entropy", "top_p_token_ids")
    found = upstream.get_log_probs_and_entropy(logits, **dict.fromkeys(keys))[1]
    ids = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    flat = [torch.cat(batch[key]) for key in ("log_probs", "advantages", "loss_masks")]
    logp, entropy = torch.cat(found["log_probs"]), torch.cat(found["entropy"])
    out = loss(LossInputs(logp, flat[0], flat[1], flat[2].bool(), ids, entropy))
    (want,) = torch.autograd.grad(reduce(out.loss) - 0.1 * reduce(entropy), logits)
    torch.testing.assert_close(got, want)
    assert set(metrics) == {"loss", "pg_loss", "entropy_loss", "pg_clipfrac", "ppo_kl"}
    assert all(v.ndim == 0 and not v.requires_grad for v in metrics.values())


@pytest.mark.parametrize("option", ["use_kl_loss", "use_tis", "context_parallel_size"])
def test_slimes_options_without_effect_are_refused(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, batch, logits, reduce = slime_case(monkeypatch)
    setattr(args, option, 2)
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')}"):
        slime.loss_function(build_loss("ppo"))(args, batch, logits, reduce)
