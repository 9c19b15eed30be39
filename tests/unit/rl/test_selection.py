"""Selections against plain Python over the whole batch, and the same set however the batch is sharded."""

from __future__ import annotations

import math
import statistics
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.rl.advantages import unlikely
from megatron_ext.rl.diagnostics import centred_discriminant, discriminant
from megatron_ext.rl.global_stats import Local, _splitmix64, exact_sum, random_keys
from megatron_ext.rl.selection import SELECTIONS, SelectionInputs, SelectionOutputs, build_selection
from megatron_ext.rl.types import LossInputs, TokenStats


class Ranks:
    """A process group of threads: every collective waits for all ranks, then each computes the same result."""

    def __init__(self, n: int) -> None:
        self.slots: list[Any] = [None] * n
        self.barrier = threading.Barrier(n, timeout=30)

    def exchange(self, rank: int, value: Tensor) -> list[Tensor]:
        self.slots[rank] = value
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone

    def run(self, fn: Callable[..., Any], shards: list[SelectionInputs]) -> list[Any]:
        results: list[Any] = [None] * len(shards)

        def work(rank: int) -> None:
            results[rank] = fn(shards[rank], Rank(self, rank))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(shards))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert all(r is not None for r in results), "a rank failed"
        return results


class Rank:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank = ranks, rank

    def sum(self, values: Tensor) -> Tensor:
        return torch.stack(self.ranks.exchange(self.rank, values)).sum(dim=0)

    def gather(self, values: Tensor) -> Tensor:
        return torch.cat(self.ranks.exchange(self.rank, values))


def batch(seed: int = 0, sequences: int = 12, dtype: torch.dtype = torch.float32) -> SelectionInputs:
    """Real statistics of random softmaxes; some masked tokens; rewards of either sign; exact ties within sequence 3."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (sequences,), generator=g)
    ids = torch.repeat_interleave(torch.arange(sequences) * 1000 + 5, lengths)
    n = ids.numel()
    logits = 3 * torch.randn(n, 11, generator=g, dtype=torch.float64)
    logits[ids == 3005] = logits[0].clone()
    logp = logits.log_softmax(-1)
    p = logp.exp()
    taken = logp.gather(1, torch.multinomial(p, 1, generator=g)).squeeze(1)
    taken[ids == 3005] = taken[0].clone()
    stats = TokenStats(*(t.to(dtype) for t in (taken, -(p * logp).sum(-1), (p * p).sum(-1), (p * p * logp).sum(-1))))
    positions = torch.cat([torch.arange(int(k)) for k in lengths])
    a = torch.randn(sequences, generator=g)[(ids - 5) // 1000]
    return SelectionInputs(stats, a, torch.rand(n, generator=g) > 0.1, ids, positions, seed=1, step=4)


def take(x: SelectionInputs, index: Tensor) -> SelectionInputs:
    stats = TokenStats(*(getattr(x.stats, f)[index] for f in ("logp", "entropy", "sum_p2", "sum_p2_logp")))
    cut = {f: getattr(x, f)[index] for f in ("advantages", "mask", "seq_ids", "positions")}
    return replace(x, stats=stats, old_logp=None if x.old_logp is None else x.old_logp[index], **cut)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in SELECTIONS},
    "clip_b-all": ("clip_b", {"mu_low": 1.0, "mu_high": 1.0, "tokens": "all"}),
    "clip_v-tight": ("clip_v", {"mu_low": 0.5, "mu_high": 1.0, "tokens": "positive"}),
    "clip_cov-many": ("clip_cov", {"frac": 0.05, "cov_low": 0.1}),
    "kl_cov-many": ("kl_cov", {"frac": 0.1}),
    "region-s": ("region", {"region": "s_negative", "advantage": "negative"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_set_does_not_depend_on_the_shards(case: str, ranks: int) -> None:
    """Tokens dealt at random, sequences split across ranks, one rank empty: bit for bit the single-rank decision."""
    name, params = CASES[case]
    selection = build_selection(name, **params)
    x = replace(batch(), old_logp=batch().stats.logp + 0.1)
    whole = selection.select(x)
    n = x.mask.numel()
    g = torch.Generator().manual_seed(ranks)
    owner = torch.randint(ranks, (n,), generator=g)
    parts = [
        t[torch.randperm(t.numel(), generator=g)] for t in ((owner == r).nonzero().squeeze(1) for r in range(ranks))
    ]
    parts.append(torch.zeros(0, dtype=torch.int64))
    outs: list[SelectionOutputs] = Ranks(ranks + 1).run(selection.select, [take(x, part) for part in parts])
    for part, out in zip(parts, outs, strict=True):
        assert torch.equal(out.keep, whole.keep[part])
        assert torch.equal(out.kl_coef, whole.kl_coef[part]) and torch.equal(out.entropy_coef, whole.entropy_coef[part])
        assert (out.weight is None) == (whole.weight is None)
        assert out.weight is None or torch.equal(out.weight, whole.weight[part])
        assert {k: v.item() for k, v in out.metrics.items()} == {k: v.item() for k, v in whole.metrics.items()}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e4, 1e4), max_size=40), st.randoms())
def test_exact_sum_is_fsum_in_any_order(values: list[float], rnd: Any) -> None:
    shuffled = list(values)
    rnd.shuffle(shuffled)
    a, b = (exact_sum(torch.tensor(v, dtype=torch.float64), Local()).item() for v in (values, shuffled))
    assert a == b == pytest.approx(math.fsum(values), rel=1e-15, abs=1e-14)


def rows(x: SelectionInputs) -> list[tuple[float, ...]]:
    """(p, H, sum p2, sum p2 log p, A, logp) of the masked tokens, as Python floats."""
    s = x.stats
    columns = [s.logp.double().exp(), s.entropy, s.sum_p2, s.sum_p2_logp, x.advantages, s.logp]
    return [tuple(float(c[i]) for c in columns) for i in range(x.mask.numel()) if x.mask[i]]


def test_the_discriminator_is_the_entropy_derivative() -> None:
    """Entropy Dynamics thm 1 and 2 by autograd on one softmax: dH/dz_k = -S_k, and D is S less its mean under p."""
    z = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    logp = z.log_softmax(0)
    p = logp.exp()
    h = -(p * logp).sum()
    (grad,) = torch.autograd.grad(h, z)
    stats = TokenStats(
        *(t.detach() for t in (logp, h.expand(9), (p * p).sum().expand(9), (p * p * logp).sum().expand(9)))
    )
    s, d = discriminant(stats), centred_discriminant(stats)
    torch.testing.assert_close(s, -grad, rtol=1e-12, atol=1e-15)
    assert (p.detach() * d).sum().item() == pytest.approx(0, abs=1e-15)
    torch.testing.assert_close(d, s - (p.detach() * s).sum())


@pytest.mark.parametrize(
    ("low", "high", "tokens"), [(1.2, math.inf, "negative"), (1.0, 1.0, "all"), (0.5, 2.0, "positive")]
)
@pytest.mark.parametrize("name", ["clip_b", "clip_v"])
def test_clip_b_and_clip_v_are_algorithms_1_and_2(name: str, low: float, high: float, tokens: str) -> None:
    x = batch(3, sequences=60, dtype=torch.float64)
    data = rows(x)
    score = [p * (h + lp) for p, h, _, _, _, lp in data]
    if name == "clip_v":
        score = [s - (h * p2 + p2l) for s, (_, h, p2, p2l, _, _) in zip(score, data, strict=True)]
    mean, sigma = statistics.fmean(score), statistics.pstdev(score)
    centre = mean if name == "clip_b" else 0.0
    expected = []
    for s, row in zip(score, data, strict=True):
        touched = tokens == "all" or (row[4] < 0) == (tokens == "negative")
        expected.append(-low * sigma <= s - centre <= high * sigma or not touched)
    out = build_selection(name, mu_low=low, mu_high=high, tokens=tokens).select(x)
    assert out.keep[x.mask].tolist() == expected and not all(expected) and not out.keep[~x.mask].any()
    assert out.metrics["selection/dropped_frac"].item() == pytest.approx(1 - sum(expected) / len(expected))
    assert out.metrics["selection/score_mean"].item() == pytest.approx(mean, abs=1e-14)
    assert out.metrics["selection/score_std"].item() == pytest.approx(sigma, rel=1e-12)


def test_equal_scores_are_no_outliers() -> None:
    """sigma is 0 then, and rounding of the mean must not drop the batch."""
    x = batch()
    rounded = 0
    for h in torch.linspace(0.4, 1.4, 40).tolist():
        same = replace(x, stats=TokenStats(*(torch.full_like(x.stats.logp, v) for v in (-0.3, h, 0.5, -0.2))))
        out = build_selection("clip_b", mu_low=0.0, mu_high=0.0, tokens="all").select(same)
        assert out.keep[x.mask].all()
        rounded += out.metrics["selection/score_mean"] != discriminant(same.stats)[0]
    assert rounded, "the means must differ from the scores somewhere, or this tests nothing"


def covariances(x: SelectionInputs) -> list[float]:
    data = rows(x)
    mean_a, mean_l = statistics.fmean(r[4] for r in data), statistics.fmean(r[5] for r in data)
    return [(r[4] - mean_a) * (r[5] - mean_l) for r in data]


def test_kl_cov_penalises_the_top_fraction() -> None:
    x = batch(5, sequences=40)
    cov = covariances(x)
    k = math.floor(0.1 * len(cov))
    top = set(sorted(range(len(cov)), key=lambda i: -cov[i])[:k])
    out = build_selection("kl_cov", frac=0.1, coef=0.5).select(x)
    assert out.kl_coef[x.mask].tolist() == [0.5 if i in top else 0.0 for i in range(len(cov))]
    assert torch.equal(out.keep, x.mask) and not out.kl_coef[~x.mask].any()
    assert out.metrics["selection/penalised_frac"].item() == pytest.approx(k / len(cov))


def test_forking_keeps_the_top_fifth_by_entropy_and_breaks_ties_by_place() -> None:
    x = batch(6)
    h, mask = x.stats.entropy.tolist(), x.mask.tolist()
    order = sorted((-h[i], int(x.seq_ids[i]), int(x.positions[i]), i) for i in range(len(h)) if mask[i])
    k = math.floor(0.2 * sum(mask))
    want = {i for *_, i in order[:k]}
    assert {i for i, kept in enumerate(build_selection("forking").select(x).keep.tolist()) if kept} == want
    flat = replace(x, stats=replace(x.stats, entropy=torch.ones_like(x.stats.entropy)))
    kept = build_selection("forking").select(flat).keep
    first = sorted((int(x.seq_ids[i]), int(x.positions[i]), i) for i in range(len(h)) if mask[i])[:k]
    assert kept.nonzero().squeeze(1).tolist() == sorted(i for *_, i in first)


def test_clip_cov_drops_random_candidates() -> None:
    x = batch(7, sequences=60)
    cov = covariances(x)
    inside = [1.0 < c < 5.0 for c in cov]
    selection = build_selection("clip_cov", frac=0.02)
    k = math.floor(0.02 * len(cov))
    assert sum(inside) > 2 * k, "the batch must leave a choice"
    dropped = ~selection.select(x).keep[x.mask]
    assert dropped.sum() == k and all(c for d, c in zip(dropped.tolist(), inside, strict=True) if d)
    again = [selection.select(replace(x, **change)).keep for change in ({}, {"step": 5}, {"seed": 2})]
    assert torch.equal(again[0], selection.select(x).keep)
    assert not torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])
    at_least_one = build_selection("clip_cov", frac=0.0).select(x)
    assert (~at_least_one.keep[x.mask]).sum() == 1


def test_clip_cov_spares_what_ppo_clips() -> None:
    x = batch(7, sequences=60)
    inside = torch.zeros_like(x.mask)
    inside[x.mask] = torch.tensor([1.0 < c < 5.0 for c in covariances(x)])
    clipped = replace(x, old_logp=x.stats.logp - 0.5 * x.advantages.sign())  # all changed along their advantage
    out = build_selection("clip_cov", frac=1.0).select(clipped)
    assert torch.equal(out.keep, x.mask) and inside.any()
    against = replace(x, old_logp=x.stats.logp + 0.5 * x.advantages.sign())
    assert torch.equal(x.mask & ~build_selection("clip_cov", frac=1.0).select(against).keep, inside)


def test_random_keys_are_splitmix64_and_uniform() -> None:
    """Reference: the generator's first outputs from seeds 0 and 1234567 (Vigna, splitmix64.c)."""
    out = _splitmix64(torch.tensor([0, 1234567]))
    assert [v % 2**64 for v in out.tolist()] == [0xE220A8397B1DCDAF, 6457827717110365317]
    ids, positions = torch.arange(64).repeat_interleave(64), torch.arange(64).repeat(64)
    keys = torch.stack([random_keys(0, step, ids, positions) for step in range(20)])
    assert keys.unique().numel() == keys.numel()
    bits = torch.stack([((keys >> b) & 1).double().mean() for b in range(64)])
    assert (bits - 0.5).abs().max() < 0.01  # 81,920 keys: 5 sigma is 0.0087
    winners = Counter((keys[:, :16].argmax(dim=1)).tolist())
    assert len(winners) >= 8  # of 16 tokens over 20 steps


def test_entropy_bonus_and_none_touch_nothing_else() -> None:
    x = batch()
    out = build_selection("entropy_bonus", coef=0.003).select(x)
    assert torch.equal(out.entropy_coef, 0.003 * x.mask.float()) and torch.equal(out.keep, x.mask)
    out = build_selection("none").select(x)
    assert torch.equal(out.keep, x.mask) and not out.kl_coef.any() and not out.entropy_coef.any()
    assert out.metrics["selection/dropped_frac"].item() == 0


REGION_TOKENS = [  # (A, r, p) -> region
    ((1.0, 1.1, 0.8), "e1"),
    ((1.0, 1.1, 0.2), "e2"),
    ((-1.0, 0.9, 0.8), "e3"),
    ((-1.0, 0.9, 0.2), "e4"),
    ((1.0, 1.1, 0.5), None),  # neither likely nor unlikely
    ((1.0, 0.9, 0.8), None),  # unaffected: changed against its advantage
    ((-1.0, 1.1, 0.2), None),
    ((1.0, 1.4, 0.8), None),  # outside the trust region
    ((-1.0, 0.6, 0.2), None),
    ((0.0, 1.1, 0.8), None),
]


@pytest.mark.parametrize("region", ["e1", "e2", "e3", "e4"])
def test_regions_of_p0(region: str) -> None:
    a, r, p = (torch.tensor(v, dtype=torch.float64) for v in zip(*(t for t, _ in REGION_TOKENS), strict=True))
    mask = torch.ones(len(a)).bool()
    x = LossInputs(p.log(), p.log() - r.log(), a, mask)
    names = [name for _, name in REGION_TOKENS]
    assert build_selection("region", region=region).inside(x).tolist() == [n != region for n in names]
    kept = build_selection("region", region=region, mode="keep").inside(x).tolist()
    assert kept == [n in (region, None) for n in names]
    assert build_selection("clip_b").inside(x).all()
    assert not build_selection("region", region=region).inside(replace(x, mask=~mask)).any()


@pytest.mark.parametrize("mode", ["drop", "keep"])
@pytest.mark.parametrize("sign", ["positive", "negative"])
@pytest.mark.parametrize("region", ["s_positive", "s_negative"])
def test_regions_of_p4(region: str, sign: str, mode: str) -> None:
    x = batch(8)
    out = build_selection("region", region=region, advantage=sign, mode=mode).select(x)
    for (p, h, _, _, a, lp), kept in zip(rows(x), out.keep[x.mask].tolist(), strict=True):
        s = p * (h + lp)
        chosen = s > 0 if region == "s_positive" else s < 0
        looked_at = a > 0 if sign == "positive" else a < 0
        assert kept == (not looked_at or (chosen if mode == "keep" else not chosen))


def test_unlikely_shapes_rewards_and_others_do_not() -> None:
    rewards, groups, logp = torch.tensor([1.0, 1.0]), torch.tensor([0, 0]), torch.tensor([-1.0, -2.0])
    shaped = build_selection("unlikely", beta_rank=0.5).shape_rewards(rewards, groups, logp)
    assert torch.equal(shaped, unlikely(rewards, groups, logp, beta_rank=0.5)) and shaped[0] < shaped[1]
    assert build_selection("clip_b").shape_rewards(rewards, groups, logp) is rewards


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("clipb", {}, "did you mean 'clip_b'"),
        ("clip_b", {"mu": 2.5}, "selection.mu=2.5 is not a parameter"),
        ("clip_b", {"mu_low": -1}, "selection.mu_low=-1"),
        ("clip_b", {"tokens": "neg"}, "selection.tokens='neg'.*did you mean 'negative'"),
        ("clip_cov", {"cov_low": 6.0}, "selection.cov_high"),
        ("kl_cov", {"frac": 1.5}, "selection.frac=1.5"),
        ("region", {"region": "e5"}, "selection.region"),
        ("unlikely", {"beta_rank": 2}, "selection.beta_rank=2"),
    ],
)
def test_bad_parameters_are_named(name: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_selection(name, **params)


def test_selections_compose() -> None:
    """Ent-Reg + Clip_B + KL-Cov: keeps intersect, coefficients add, each decides on the whole batch."""
    x = batch()
    also = [
        {"name": "clip_v", "mu_low": 0.5, "tokens": "all"},
        {"name": "entropy_bonus", "coef": 0.003},
        {"name": "kl_cov", "frac": 0.1},
    ]
    both = build_selection("clip_b", mu_low=0.5, renormalise=True, also=also)
    clip_b, clip_v = (
        build_selection("clip_b", mu_low=0.5).select(x),
        build_selection("clip_v", mu_low=0.5, tokens="all").select(x),
    )
    kl_cov = build_selection("kl_cov", frac=0.1).select(x)
    got = both.select(x)
    assert both.renormalise and not both.per_update
    assert torch.equal(got.keep, clip_b.keep & clip_v.keep) and int(got.keep.sum()) < int(clip_b.keep.sum())
    assert torch.equal(got.entropy_coef, 0.003 * x.mask.float())
    assert torch.equal(got.kl_coef, kl_cov.kl_coef)
    assert got.metrics["selection/dropped_frac"] == clip_b.metrics["selection/dropped_frac"]
    assert got.metrics["selection/clip_v/dropped_frac"] == clip_v.metrics["selection/dropped_frac"]


def test_composed_rules_on_rewards_and_ratios_apply_too() -> None:
    both = build_selection("unlikely", also=[{"name": "region", "region": "e4"}])
    rewards, groups, logp = torch.tensor([1.0, 1.0]), torch.zeros(2, dtype=torch.long), torch.tensor([-1.0, -2.0])
    assert torch.equal(both.shape_rewards(rewards, groups, logp), unlikely(rewards, groups, logp))
    x = LossInputs(
        torch.tensor([0.2, 0.9]).log(), torch.tensor([0.22, 1.0]).log(), -torch.ones(2), torch.ones(2).bool()
    )
    assert both.inside(x).tolist() == [False, True]


@pytest.mark.parametrize("field", ["logp", "sum_p2_logp", "advantages"])
def test_nan_in_what_counts_is_refused_and_elsewhere_ignored(field: str) -> None:
    x = batch()

    def spoil(where: Tensor) -> SelectionInputs:
        values = getattr(x, field) if field == "advantages" else getattr(x.stats, field)
        bad = torch.where(where, math.nan, values)
        return (
            replace(x, advantages=bad) if field == "advantages" else replace(x, stats=replace(x.stats, **{field: bad}))
        )

    for name in SELECTIONS:
        build_selection(name).select(spoil(~x.mask))
        with pytest.raises(ValueError, match=f"{field} of .* is not finite"):
            build_selection(name).select(spoil(x.mask & (torch.arange(x.mask.numel()) % 7 == 0)))


def test_entropy_ratio_clipping_is_strict_and_two_sided() -> None:
    old = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 0.0, 1.0])
    now = torch.tensor([0.95, 0.951, 1.049, 2.11, 1.89, 0.0, 1.0])
    x = LossInputs(-old, -old, old, torch.tensor([True] * 6 + [False]), entropy=now.requires_grad_(), old_entropy=old)
    selection = build_selection("entropy_ratio")
    assert selection.inside(x).tolist() == [False, True, True, False, False, True, False]  # 0 / 0 counts as unchanged
    with pytest.raises(ValueError, match="old_entropy is None"):
        selection.inside(replace(x, old_entropy=None))


@pytest.mark.parametrize("floor", [1e-6, 100.0])
def test_steer_is_the_authors_exponential_weight(floor: float) -> None:
    """`compute_token_weights` of the authors' code in plain Python, the largest |Omega| over the whole batch."""
    x = batch(dtype=torch.float64)
    old = x.stats.logp + 0.2 * torch.randn(x.mask.numel(), generator=torch.Generator().manual_seed(8))
    x = replace(x, old_logp=old.to(torch.float64))
    out = build_selection("steer", weight_min=0.7, omega_floor=floor).select(x)
    tensors = (x.stats.logp, x.stats.entropy, x.old_logp, x.advantages, x.mask)
    omegas = [
        abs(a / math.exp(before) * math.exp(lp) * (1 - math.exp(lp)) * (lp + h)) if counts else 0.0
        for lp, h, before, a, counts in zip(*(t.tolist() for t in tensors), strict=True)
    ]
    k = -math.log(0.7) / max(*omegas, floor)
    assert out.weight is not None
    got = out.weight[x.mask].tolist()
    assert got == pytest.approx([math.exp(-k * o) for o, counts in zip(omegas, x.mask.tolist(), strict=True) if counts])
    assert min(got) == pytest.approx(0.7) if floor < 1 else min(got) > 0.9
    assert torch.equal(out.keep, x.mask) and not out.kl_coef.any()
    both = build_selection("steer", weight_min=0.7, omega_floor=floor, also=[{"name": "steer", "omega_floor": floor}])
    alone = build_selection("steer", omega_floor=floor).select(x).weight
    torch.testing.assert_close(both.select(x).weight, out.weight * alone)
