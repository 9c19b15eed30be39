"""The critic's pure parts: clipped value loss against the textbook under autograd, whitening, explained variance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.rl.value import explained_variance, last_token_rewards, value_loss, whiten
from recipes.checks.settings import load_checked

NUMBERS = st.floats(-3, 3, allow_nan=False, width=32)
V = [0.5, 1.5, -1.5, 0.9, 1.5, 0.2]
R = [1.0, 2.0, -2.0, -1.0, 1.0, 0.2]
#    inside, out towards R twice, inside, past R (R within), already there;  V_old = 0, c = 1
LOSS = [0.125, 0.5, 0.5, 1.805, 0.125, 0.0]
GRADIENT = [-0.5, 0.0, 0.0, 1.9, 0.5, 0.0]  # V - R, or 0 where clipped


def double(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_clipped_loss_and_gradient_by_hand() -> None:
    values = double(V).requires_grad_()
    loss, clipped = value_loss(values, double(R), torch.zeros(6, dtype=torch.float64), clip_range=1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    torch.testing.assert_close(loss.detach(), double(LOSS), rtol=0, atol=1e-15)
    torch.testing.assert_close(gradient, double(GRADIENT), rtol=0, atol=1e-15)
    assert clipped.tolist() == [False, True, True, False, False, False]


def test_without_clipping_it_is_half_the_square() -> None:
    values = double(V).requires_grad_()
    loss, clipped = value_loss(values, double(R), torch.zeros(6, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    torch.testing.assert_close(loss.detach(), (double(V) - double(R)) ** 2 / 2, rtol=0, atol=0)
    torch.testing.assert_close(gradient, double(V) - double(R), rtol=0, atol=0)
    assert not clipped.any()


@settings(deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=8), st.floats(0.01, 2))
def test_equals_the_textbook_under_autograd(rows: list[tuple[float, float, float]], clip_range: float) -> None:
    value, returns, old = (double(list(column)) for column in zip(*rows, strict=True))
    mine, textbook = value.clone().requires_grad_(), value.clone().requires_grad_()
    loss, clipped = value_loss(mine, returns, old, clip_range=clip_range)
    bounded = old + (textbook - old).clamp(-clip_range, clip_range)
    expected = torch.maximum((textbook - returns) ** 2, (bounded - returns) ** 2) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(x.sum(), y)[0] for x, y in ((loss, mine), (expected, textbook))]
    # At the edge of the interval, and where both terms tie, either one-sided derivative is right.
    smooth = ((value - old).abs() - clip_range).abs() > 1e-9
    smooth &= ((value - returns) ** 2 - (bounded - returns) ** 2).abs().gt(1e-9) | ((value - old).abs() < clip_range)
    torch.testing.assert_close(gradients[0][smooth], gradients[1][smooth], rtol=1e-12, atol=1e-12)
    assert not bool((gradients[0][clipped] != 0).any())


def test_reward_on_the_last_token() -> None:
    rewards = last_token_rewards(torch.tensor([2.0, -1.0, 3.0]), torch.tensor([0, 3, 4, 6]))
    assert rewards.tolist() == [0, 0, 2, -1, 0, 3] and rewards.dtype == torch.float64


def test_whitening_looks_at_masked_tokens_only() -> None:
    mask = torch.tensor([True, True, False, True, True])
    out = whiten(double([1, 2, 100, 3, 6]), mask)
    assert out[2] == 0
    torch.testing.assert_close(out[mask], (double([1, 2, 3, 6]) - 3) / 3.5**0.5, rtol=1e-7, atol=0)
    assert whiten(double([5, 5]), torch.tensor([True, True])).tolist() == [0, 0]
    assert whiten(double([5, 4]), torch.tensor([False, False])).tolist() == [0, 0]


def test_explained_variance() -> None:
    returns = double([0, 1, 2, 3])
    assert explained_variance(returns + 7, returns) == 1, "a constant error is not variance"
    assert explained_variance(torch.zeros(4), returns) == 0
    assert explained_variance(returns * 2, returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(torch.ones(4), torch.ones(4)) == 0, "nothing to explain"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("advantage.name=gae advantage.params.lamb=0.9", ["advantage.params.lamb=0.9", "'lam'"]),
        ("advantage.name=gae advantage.params.gamma=2", ["advantage.params.gamma=2", "[0, 1]"]),
        ("advantage.name=gea", ["advantage.name=gea", "'gae'"]),
        ("critic.clip_range=0", ["critic.clip_range=0", "null"]),
        ("critic.warmup_steps=-1", ["critic.warmup_steps=-1", "at least 0"]),
        ("advantage.name=gae critic.warmup_steps=9 train.steps=9", ["critic.warmup_steps=9", "below train.steps=9"]),
    ],
)
def test_settings_of_the_critic_are_checked(arguments: str, said: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        load_checked(arguments.split())
    assert all(words in str(caught.value) for words in said), caught.value


def test_a_critic_is_one_line() -> None:
    config = load_checked("advantage.name=gae advantage.params.lam=0.95 critic.lr=1e-3".split())
    assert config.advantage.params == {"lam": 0.95} and config.critic.lr == 1e-3
