"""Advantages from rewards, and the shaping and filtering of rewards.

Tensors: ``rewards_B`` one score per sampled response, ``groups_B`` int64, equal for responses to the same prompt
(any ids, any order). Everything is computed and returned in float64; group sizes may differ.
Sources: CE-GPPO eq. 2, Clip-Low/High app. C, Entropy Dynamics app. E.4, and as stated below.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ext.rl.params import check_choice, check_number, suggest


def _group_index(groups_B: Tensor) -> tuple[Tensor, Tensor]:
    """(index_B into the groups, size of each response's group as float64), both (B,)."""
    _, index, counts = torch.unique(groups_B, return_inverse=True, return_counts=True)
    return index, counts[index].double()


def _group_mean(values_B: Tensor, index_B: Tensor, size_B: Tensor) -> Tensor:
    """Mean over each response's group, (B,)."""
    sums = torch.zeros_like(values_B).index_add_(0, index_B, values_B)
    return sums[index_B] / size_B


def informative_groups(rewards_B: Tensor, groups_B: Tensor) -> Tensor:
    """Bool (B,): False for the responses of a group whose rewards are all equal: such a group has no learning signal.

    DAPO's dynamic sampling keeps the other groups and refills the batch up to a cap (Yu et al. 2025).
    """
    index, _ = _group_index(groups_B)
    rewards = rewards_B.double()
    start = torch.zeros(int(index.max()) + 1 if index.numel() else 0, dtype=rewards.dtype, device=rewards.device)
    low = start.scatter_reduce(0, index, rewards, "amin", include_self=False)
    high = start.scatter_reduce(0, index, rewards, "amax", include_self=False)
    return (high != low)[index]


def _centred(rewards_B: Tensor, groups_B: Tensor) -> Tensor:
    """R - group mean, and exactly 0 (not rounding noise) where a group's rewards are all equal."""
    index, size = _group_index(groups_B)
    centred = rewards_B - _group_mean(rewards_B, index, size)
    return torch.where(informative_groups(rewards_B, groups_B), centred, torch.zeros_like(centred))


def grpo(rewards_B: Tensor, groups_B: Tensor, *, delta: float = 1e-6, unbiased: bool = True) -> Tensor:
    """(R - mean) / (std + delta) within the group; sample standard deviation, or population with unbiased=False.

    Flexible Entropy Control sec. 2.1 prints delta, CE-GPPO eq. 2 and Entropy Dynamics omit it; none says which
    standard deviation.
    """
    check_number("advantage.params.delta", delta, 0)
    index, size = _group_index(groups_B)
    centred = _centred(rewards_B, groups_B)
    std = _group_mean(centred.square(), index, size).sqrt()
    if unbiased:
        std = std * (size / (size - 1).clamp(min=1)).sqrt()
    return torch.where(centred == 0, centred, centred / (std + delta))


def dr_grpo(rewards_B: Tensor, groups_B: Tensor) -> Tensor:
    """R - group mean. Source: Liu et al. 2025 (Dr. GRPO); used by Clip-Low/High."""
    return _centred(rewards_B, groups_B)


def rloo(rewards_B: Tensor, groups_B: Tensor) -> Tensor:
    """R - mean of the *other* responses of the group; 0 for a group of one. Source: Ahmadian et al. 2024."""
    _, size = _group_index(groups_B)
    return _centred(rewards_B, groups_B) * size / (size - 1).clamp(min=1)


def reinforce_pp(rewards_B: Tensor, groups_B: Tensor, *, baseline: str = "none", delta: float = 1e-8) -> Tensor:
    """REINFORCE++ (Hu 2025): normalised over the batch, (R - mean) / (std + delta), population std over responses.

    ``baseline="group"`` subtracts the group mean first. Without it groups have no effect, so a group of equal rewards
    does *not* get 0 unless the whole batch is equal. The original whitens tokens; here there is one reward per
    response, so responses are whitened.
    """
    check_choice("advantage.params.baseline", baseline, ("none", "group"))
    check_number("advantage.params.delta", delta, 0)
    groups = groups_B if baseline == "group" else torch.zeros_like(groups_B)
    centred = _centred(rewards_B, groups)  # its mean over the batch is 0 either way
    return torch.where(centred == 0, centred, centred / (centred.square().mean().sqrt() + delta))


def qae(
    rewards_B: Tensor, groups_B: Tensor, *, quantile: float = 0.4, delta: float = 1e-6, interpolate: bool = False
) -> Tensor:
    """Quantile Advantage Estimation: (R - b) / (std + delta), b the group's quantile instead of its mean.

    b = inf {x : F(x) >= quantile}, F the group's empirical distribution. With rewards 0 and 1 only the right responses
    of hard groups (mean <= 1 - quantile) and the wrong ones of easy groups get an advantage. ``interpolate=True`` is
    the authors' code, `torch.quantile`, which gives a value between 0 and 1 where the quantile falls between the two.
    Sample standard deviation, as in `grpo`. Source: Wu et al. 2025, arXiv:2509.22611.
    """
    check_number("advantage.params.quantile", quantile, 0, 1, exclusive=True)
    check_number("advantage.params.delta", delta, 0)
    result = torch.zeros_like(rewards_B)
    for group in torch.unique(groups_B):
        member = groups_B == group
        rewards = rewards_B[member]
        std = rewards.std() if rewards.numel() > 1 else rewards.new_zeros(())
        place = quantile * rewards.numel()
        # the smallest reward whose rank is at least quantile * n; the slack keeps 0.4 * 5 from being above 2
        lowest = rewards.sort().values[max(math.ceil(place - 1e-9), 1) - 1]
        baseline = torch.quantile(rewards, quantile) if interpolate else lowest
        result[member] = (rewards - baseline) / (std + delta)
    return torch.where(informative_groups(rewards_B, groups_B), result, torch.zeros_like(result))


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "qae": qae,
}


def compute_advantages(name: str, rewards_B: Tensor, groups_B: Tensor, **params: object) -> Tensor:
    """One advantage per response, float64 (B,).

    Raises:
        ValueError: unknown estimator or parameter, shapes that differ, or a reward that is not finite.
    """
    if name not in ADVANTAGES:
        known = ", ".join((*ADVANTAGES, "gae"))  # gae is per token and needs a critic, so it is not in the table
        raise ValueError(f"advantage.name={name!r} is unknown{suggest(name, ADVANTAGES)}; choose one of {known}.")
    fn = ADVANTAGES[name]
    known_params = list(fn.__kwdefaults__ or {})
    for key in params:
        if key not in known_params:
            raise ValueError(
                f"advantage.params.{key}={params[key]!r} is not a parameter of {name!r}{suggest(key, known_params)}; "
                f"it takes {', '.join(known_params) or 'none'}."
            )
    if rewards_B.ndim != 1 or rewards_B.shape != groups_B.shape:
        shapes = f"{tuple(rewards_B.shape)} and {tuple(groups_B.shape)}"
        raise ValueError(f"rewards and groups have shapes {shapes}: pass one reward and one group per response.")
    if not torch.isfinite(rewards_B).all():
        raise ValueError("a reward is not finite: give such samples the configured score before this point.")
    return fn(rewards_B.double(), groups_B, **params)


def unlikely(rewards_B: Tensor, groups_B: Tensor, seq_logp_B: Tensor, *, beta_rank: float = 0.25) -> Tensor:
    """Unlikeliness reward (He et al. 2025): positive rewards times 1 - beta_rank (G - rank) / G, float64 (B,).

    ``rank`` is 1 for the most likely response of the group (by ``seq_logp_B``, the summed log-probability, nats) and G
    for the least likely, which keeps its full reward. Ties go by order in the batch. Other rewards are unchanged.
    """
    check_number("selection.beta_rank", beta_rank, 0, 1)
    index, size = _group_index(groups_B)
    order = torch.argsort(seq_logp_B, descending=True, stable=True)
    order = order[torch.argsort(index[order], stable=True)]  # by group, then most likely first
    first = torch.zeros(int(index.max()) + 1 if index.numel() else 0, dtype=torch.int64, device=index.device)
    first[1:] = torch.bincount(index).cumsum(0)[:-1]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device) - first[index[order]] + 1
    rewards = rewards_B.double()
    return torch.where(rewards > 0, rewards * (1 - beta_rank * (size - rank) / size), rewards)


def soft_overlong_penalty(lengths_B: Tensor, *, max_tokens: int, buffer: int, factor: float = 1.0) -> Tensor:
    """Added to the reward: 0 up to max_tokens - buffer, falling linearly to -factor at max_tokens and beyond, (B,).

    Source: Yu et al. 2025 (DAPO) eq. 13; Clip-Low/High uses factor 1.0. ``lengths_B`` in response tokens.

    Raises:
        ValueError: unless 0 < buffer <= max_tokens and factor >= 0.
    """
    check_number("advantage.overlong_buffer", buffer, 1, max_tokens)
    check_number("advantage.overlong_factor", factor, 0, math.inf)
    excess = (lengths_B.double() - (max_tokens - buffer)) / buffer
    return -factor * excess.clamp(0, 1)


def gae(
    rewards_T: Tensor, values_T: Tensor, seq_ids_T: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over ragged flat tokens (Schulman et al. 2016; Entropy Dynamics app. E.4).

    A_t = sum_l (gamma lam)^l delta_{t+l} with delta_t = r_t + gamma V_{t+1} - V_t; the value after the last token is 0.

    Args:
        rewards_T: reward per token, usually 0 but for the last token of a sequence.
        values_T: critic's value of the state in which token t was chosen.
        seq_ids_T: sequence of each token; the tokens of a sequence are contiguous and in order.
    Returns:
        advantages and returns (advantages + values), float64 (T,) each.
    """
    check_number("advantage.params.gamma", gamma, 0, 1)
    check_number("advantage.params.lam", lam, 0, 1)
    ids, lengths = torch.unique_consecutive(seq_ids_T, return_counts=True)
    if torch.unique(ids).numel() != ids.numel():
        raise ValueError("seq_ids holds a sequence in several pieces: gae needs each sequence's tokens contiguous.")
    rewards, values = (
        torch.nn.utils.rnn.pad_sequence(t.double().split(lengths.tolist()), batch_first=True)
        for t in (rewards_T, values_T)
    )
    present = torch.arange(rewards.shape[1], device=lengths.device) < lengths[:, None]
    advantages = torch.zeros_like(rewards)
    ahead = next_value = torch.zeros_like(rewards[:, 0])  # padding holds 0, like the position after the last token
    for t in reversed(range(rewards.shape[1])):
        ahead = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * ahead
        advantages[:, t] = ahead
        next_value = values[:, t]
    flat = advantages[present]
    return flat, flat + values_T.double()
