"""Aggregation against its definitions, and the gradient of the whole objective for every division of the batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_ext.rl.aggregation import AGGREGATIONS, sequence_weights
from megatron_ext.rl.losses import LOSSES, build_loss
from megatron_ext.rl.losses.kl import kl_to_reference
from megatron_ext.rl.types import LossInputs

LENGTHS = torch.tensor([4, 1, 3, 2, 6])
GROUPS = torch.tensor([8, 8, 1, 1, 1])


def definition(name: str, loss: list[list[float]]) -> float:
    """The objective as written in the papers, from nested lists."""
    means = [sum(row) / len(row) for row in loss]
    if name == "token_mean":
        return sum(map(sum, loss)) / sum(map(len, loss))
    if name == "seq_mean_token_mean":
        return sum(means) / len(means)
    if name == "group_token_mean":
        groups = [[loss[i] for i in range(len(loss)) if GROUPS[i] == g] for g in (8, 1)]
        return sum(sum(map(sum, rows)) / sum(map(len, rows)) for rows in groups) / 2
    if name == "seq_mean_token_sum":
        return sum(map(sum, loss)) / len(loss)
    return sum(sum(row) / 10 for row in loss) / len(loss)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_weights_give_the_defined_objective(name: str) -> None:
    loss = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = [row.tolist() for row in loss.split(LENGTHS.tolist())]
    weights = sequence_weights(name, LENGTHS, GROUPS, max_tokens=10)
    assert weights.dtype == torch.float64
    total = (weights.repeat_interleave(LENGTHS) * loss).sum().item()
    assert total == pytest.approx(definition(name, rows), rel=1e-13)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_filtered_samples_leave_the_denominators(name: str) -> None:
    include = torch.tensor([True, False, True, True, False])
    got = sequence_weights(name, LENGTHS, GROUPS, max_tokens=10, include_B=include)
    alone = sequence_weights(name, LENGTHS[include], GROUPS[include], max_tokens=10)
    assert got[include].tolist() == alone.tolist() and (got[~include] == 0).all()
    empty = sequence_weights(name, torch.where(include, LENGTHS, 0), GROUPS, max_tokens=10)
    assert empty.tolist() == got.tolist()
    nothing = sequence_weights(name, LENGTHS, GROUPS, max_tokens=10, include_B=torch.zeros(5).bool())
    assert nothing.tolist() == [0.0] * 5


def test_bad_names_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'token_mean'"):
        sequence_weights("tokenmean", LENGTHS, GROUPS)
    with pytest.raises(ValueError, match="max_tokens"):
        sequence_weights("constant", LENGTHS, GROUPS)


def gradient(name: str, aggregation: str, cuts: list[list[int]]) -> Tensor:
    """d objective / d logits of a tabular policy, its sequences divided into micro-batches by ``cuts``."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(16, 7, generator=g, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(7, (16,), generator=g)
    ids = torch.arange(5).repeat_interleave(LENGTHS)
    a = torch.randn(5, generator=g, dtype=torch.float64)[ids]
    logp = logits.log_softmax(-1).gather(1, actions[:, None]).squeeze(1)
    old = logp.detach() + 0.3 * torch.randn(16, generator=g, dtype=torch.float64)
    entropy = -(logits.detach().softmax(-1) * logits.detach().log_softmax(-1)).sum(-1)
    weights = sequence_weights(aggregation, LENGTHS, GROUPS, max_tokens=10)  # over the whole batch, before any cut
    params = {"strategy": "both"} if name == "dynamic_clip" else {}
    for cut in cuts:
        t = torch.isin(ids, torch.tensor(cut))
        x = LossInputs(logp[t], old[t], a[t], torch.ones(int(t.sum())).bool(), ids[t], entropy[t])
        (build_loss(name, **params)(x).loss * weights[ids[t]]).sum().backward(retain_graph=True)
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_does_not_depend_on_the_micro_batches(name: str, aggregation: str) -> None:
    whole = gradient(name, aggregation, [[0, 1, 2, 3, 4]])
    assert whole.abs().max() > 0
    for cuts in ([[0], [1], [2], [3], [4]], [[3, 0], [4, 1, 2]]):
        torch.testing.assert_close(gradient(name, aggregation, cuts), whole, rtol=1e-12, atol=1e-16)


def test_kl_estimators_on_an_enumerated_distribution() -> None:
    """In expectation under the policy: k1 and k3 are KL(pi || ref); k1 and k2 have its gradient, k3 KL(ref || pi)'s."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(6, generator=g, dtype=torch.float64).log_softmax(0)
    logp = z.log_softmax(0)
    kl = (logp.exp() * (logp - ref)).sum()
    (forward,) = torch.autograd.grad(kl, z, retain_graph=True)
    (reverse,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), z, retain_graph=True)
    p = logp.exp().detach()
    for name, gradient in {"k1": forward, "k2": forward, "k3": reverse}.items():
        value = (p * kl_to_reference(name, logp, ref)).sum()
        (got,) = torch.autograd.grad(value, z, retain_graph=True)
        assert torch.allclose(value, kl, rtol=1e-12) == (name != "k2")
        torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match="reference.kl_type"):
        kl_to_reference("k4", logp, ref)


def test_kl_values_and_gradients_token_by_token() -> None:
    """The values and F by their formulas; both stay finite for large differences."""
    logp = torch.tensor([-1.0, -2.0, -0.5, -80.0], requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -0.5, -1.0])
    d = [0.5, -1.0, 0.0]
    expected = {
        "k1": (d, d),
        "k2": ([x * x / 2 for x in d], d),
        "k3": ([math.exp(-x) - 1 + x for x in d], [1 - math.exp(-x) for x in d]),
    }
    for name, (values, weights) in expected.items():
        got = kl_to_reference(name, logp, ref)
        (slope,) = torch.autograd.grad(got.sum(), logp)
        assert got[:3].tolist() == pytest.approx(values, abs=1e-6) and slope[:3].tolist() == pytest.approx(
            weights, abs=1e-6
        )
        assert bool(torch.isfinite(got).all() and torch.isfinite(slope).all()) and float(slope[3]) < -70
