"""The measurements of the invariance matrix in every layout, in spawned processes. See `test_invariance_matrix`."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import gloo
import learner_cases as cases
import torch
from learner_cases import Layout
from safetensors.torch import save_file
from torch import Tensor

from configs.schema import OptimConfig
from megatron_ext.rl.aggregation import AGGREGATIONS
from megatron_ext.rl.losses import build_loss

if TYPE_CHECKING:
    from megatron_ext.learner.learner import Learner
    from megatron_ext.learner.step import TrainBatch
    from megatron_ext.rl.types import TokenStats

PROCESSES = 8
SHUFFLED = (7, 2, 9, 0, 10, 4, 1, 6, 8, 3, 5)
# The second has fewer samples than there are replicas; in the third, part of a region is not trained either.
MINI_BATCHES = ([0, 1, 2, 3, 4], [10], [5, 6, 7, 8, 9])
SGD_LR, ADAM_LR = 0.01, 1e-3
FAR, CLIP = 1e9, 0.1  # clipping norms: one that is never reached, and one that always is
OBJECTIVES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {  # loss, its parameters, selection
    "ce_gppo": ("ce_gppo", {"beta1": 0.5, "beta2": 0.8}, None),
    "dynamic_clip/id": ("dynamic_clip", {"strategy": "id", "step": 3, "total_steps": 10}, None),
    "gspo": ("gspo", {"eps_low": 0.02, "eps_high": 0.02}, None),
    "clip_v": ("ce_gppo", {}, {"name": "clip_v", "mu_low": 0.5, "mu_high": 0.5, "tokens": "all"}),
    "kl_cov": ("ppo", {}, {"name": "kl_cov", "frac": 0.2}),
}
REPLAYED = ("gspo", "kl_cov")  # objectives that a mixture of experts trains on given routing
SELECTIONS: dict[str, dict[str, Any]] = {  # in no objective: compared by the tokens they select
    "clip_b": {"mu_low": 0.5, "mu_high": 0.5, "tokens": "all"},
    "clip_cov": {"frac": 0.2, "cov_low": -1.0, "cov_high": 1.0},
    "forking": {"frac": 0.3},
}

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """A layout, how it cuts the batch, and which of the models it trains."""

    layout: Layout
    moe: bool = False
    other: str = ""  # a model besides the dense one and the mixture of experts
    tokens: int = 16  # token budget of a micro-batch
    recompute: bool = False
    modules: tuple[str, ...] = ()  # with recompute
    static: bool = False  # micro-batches of one length between pipeline stages, whatever the padding
    overlap: bool = False  # of gradient reduction, in buckets of a few parameters
    chunk: int = 0  # train.loss_chunk_tokens
    order: tuple[int, ...] = tuple(range(len(cases.LENGTHS)))

    @property
    def objectives(self) -> list[str]:
        """CE-GPPO and two others, which rotate over the layouts of each model; references train all."""
        if self.name == self.reference:
            return list(OBJECTIVES)
        alike = [v for v in VARIANTS if v.model == self.model and (v is self or not v.layout.distributed_optimizer)]
        others = list(OBJECTIVES)[1:]
        if self.model != "dense":
            others = [name for name in others if name in REPLAYED]  # few layouts, which replay routing
        pairs = list(itertools.combinations(others, 2))
        return ["ce_gppo", *pairs[alike.index(self) % len(pairs)]]

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def model(self) -> str:
        return self.other or ("moe" if self.moe else "dense")

    @property
    def reference(self) -> str:
        return f"one-{self.other}" if self.other else "one-moe" if self.moe else "one"


def _variant(name: str, world: int = 1, parallel: dict[str, int] | None = None, **more: Any) -> Variant:
    return Variant(Layout(name, world, parallel or {}, more.pop("sharded", False)), **more)


TP2_SP = {"tp": 2, "sp": True}
VARIANTS = (
    _variant("one"),
    _variant("one-moe", moe=True),
    _variant("one-olmo3", other="olmo3"),
    _variant("one-shared-expert", other="shared-expert"),
    _variant("one-deepseek", other="deepseek"),
    _variant("one, a sample each, recompute", tokens=1, recompute=True),
    _variant("one, all at once, chunked, shuffled", tokens=1 << 16, chunk=5, order=SHUFFLED),
    _variant("one-moe, all at once, shuffled", tokens=1 << 16, order=SHUFFLED, moe=True),
    _variant("tp2", 2, {"tp": 2}),
    _variant("tp2 sp", 2, TP2_SP, recompute=True, modules=("mlp",)),
    _variant("pp2", 2, {"pp": 2, "first_stage_layers": 1}, static=True),
    _variant("pp2 vpp2", 2, {"pp": 2, "vpp": 2}),
    _variant("cp2", 2, {"cp": 2}),
    _variant("dp2", 2, overlap=True),
    _variant("dp2 distributed optimizer", 2, sharded=True),
    _variant("ep2", 2, {"ep": 2}, moe=True),
    _variant("tp2 sp ep2", 2, {**TP2_SP, "ep": 2}, moe=True),
    _variant("tp4, 2 key-value heads", 4, {"tp": 4}, tokens=40),
    _variant("tp2 sp, OLMo-3", 2, TP2_SP, other="olmo3", recompute=True),
    _variant("tp2 sp pp2 ep2, shared expert", 4, {**TP2_SP, "pp": 2, "ep": 2}, other="shared-expert"),
    _variant("tp2 sp, DeepSeek", 2, TP2_SP, other="deepseek"),
    _variant("tp2 sp cp2 ep2, DeepSeek", 4, {**TP2_SP, "cp": 2, "ep": 2}, other="deepseek", tokens=40, recompute=True),
    _variant("cp4", 4, {"cp": 4}, tokens=40),
    _variant("tp2 cp2", 4, {"tp": 2, "cp": 2}, tokens=40, order=SHUFFLED),
    _variant("tp2 sp cp2", 4, {**TP2_SP, "cp": 2}, tokens=40, chunk=3),
    _variant("tp2 pp2", 4, {"tp": 2, "pp": 2}, tokens=24),
    _variant("pp2 cp2", 4, {"pp": 2, "cp": 2, "last_stage_layers": 1}, tokens=24, recompute=True),
    _variant("pp2 vpp2 dp2", 4, {"pp": 2, "vpp": 2}, order=SHUFFLED, overlap=True),
    _variant("tp2 dp2 distributed optimizer", 4, {"tp": 2}, sharded=True, overlap=True),
    _variant("cp2 ep2", 4, {"cp": 2, "ep": 2}, moe=True, tokens=40, order=SHUFFLED),
    _variant("pp2 ep2", 4, {"pp": 2, "ep": 2}, moe=True, tokens=24, recompute=True, modules=("moe",)),
    _variant("dp4 ep2 distributed optimizer", 4, {"ep": 2}, moe=True, sharded=True, overlap=True),
    _variant("tp2 pp2 cp2", 8, {"tp": 2, "pp": 2, "cp": 2}, tokens=40),
    _variant("tp2 sp pp2 vpp2 cp2", 8, {**TP2_SP, "pp": 2, "vpp": 2, "cp": 2}, tokens=40, recompute=True, static=True),
    _variant("cp2 dp4", 8, {"cp": 2}, tokens=80, overlap=True),
    _variant("tp2 sp cp2 dp2 distributed optimizer", 8, {**TP2_SP, "cp": 2}, tokens=80, sharded=True),
    _variant("tp2 sp cp2 dp2 ep4", 8, {**TP2_SP, "cp": 2, "ep": 4}, moe=True, tokens=80, overlap=True),
    _variant("tp2 sp pp2 dp2 ep2", 8, {**TP2_SP, "pp": 2, "ep": 2}, moe=True, tokens=24),
)


def run(rank: int, root: Path) -> None:
    from configs.schema import ParallelConfig
    from megatron_ext.learner.model import distributed

    for world in sorted({variant.layout.world for variant in VARIANTS}):
        team, place = divmod(rank, world)
        mine = [variant for variant in VARIANTS if variant.layout.world == world][team :: PROCESSES // world]
        for variant in mine:
            begin = time.process_time()
            with gloo.group(place, world, root / f"store-{variant.name}"):
                with distributed(ParallelConfig(**variant.layout.parallel), seed=1):  # type: ignore[arg-type]
                    results = _measure(variant, root / variant.model)
                seconds = torch.tensor(time.process_time() - begin)
                torch.distributed.all_reduce(seconds)
            if place == 0:
                results["seconds"] = seconds
                save_file({k: v.contiguous() for k, v in results.items()}, root / variant.name)


def _measure(variant: Variant, model_dir: Path) -> Results:
    """All measurements of one layout; per-token results are in the order of the recorded batch."""
    from megatron_ext.learner import weights

    sharded, reference = variant.layout.distributed_optimizer, variant.name == variant.reference
    out: Results = {}
    # Megatron's distributed optimizer takes Adam only, and float32.
    for dtype in ("float32",) * (sharded or reference) + ("float64",) * (not sharded):
        learner = _learner(variant, model_dir, dtype, "adam")
        _check_staged(learner, model_dir.parent)
        if dtype == "float32":
            out |= {f"initial/{name}": tensor for name, tensor in _exported(learner).items()}
        stats = learner.statistics(cases.make_batch(learner.dtype, list(variant.order)))
        out |= {f"adam-{dtype}/{k}": v for k, v in _trained(variant, learner, "ce_gppo", stats).items()}
    if not sharded:
        learner = _learner(variant, model_dir, "float64", "sgd")
        stats = learner.statistics(cases.make_batch(learner.dtype, list(variant.order)))
        for objective in variant.objectives:
            out |= {f"{objective}/{k}": v for k, v in _trained(variant, learner, objective, stats).items()}
            weights.import_hf(learner.hf, model_dir, learner.chunks)
        out |= {f"{name}/selected": _selected(variant, stats, name) for name in SELECTIONS}
        # The gradients, before and after clipping by their norm.
        for name, limit in (("gradient", FAR), ("clipped", CLIP)):
            learner.optimizer.config.clip_grad = limit
            norm, moved = _step(variant, learner, stats)
            out |= {f"{name}/{k}": v for k, v in moved.items()} | {f"reported/{name}": norm}
        out |= {f"report/{k}": torch.tensor(v, dtype=torch.float64) for k, v in learner.packing_report().items()}
    return out


def _learner(variant: Variant, model_dir: Path, dtype: str, optimizer: str) -> Learner:
    from megatron_ext.learner.learner import Learner

    optim = OptimConfig(optimizer=optimizer, lr=SGD_LR, clip_grad=FAR)
    if optimizer == "adam":
        optim.lr, optim.betas, optim.weight_decay = ADAM_LR, [0.9, 0.95], 0.1
    config = cases.make_config(variant.layout, dtype, optim, micro_batch_tokens=variant.tokens)
    config.model.recompute, config.train.loss_chunk_tokens = variant.recompute, variant.chunk
    config.model.recompute_modules = list(variant.modules)
    config.optim.overlap_param_gather = variant.overlap and variant.layout.distributed_optimizer
    config.optim.overlap_grad_reduce, config.optim.bucket_parameters = variant.overlap, 500
    learner = Learner(config, model_dir, total_updates=100)
    if variant.static:
        learner.most_padding = 99.0
    return learner


def _exported(learner: Learner) -> Results:
    return {name: tensor.clone() for name, tensor in learner.export()}


def _check_staged(learner: Learner, parent: Path) -> None:
    """Files of which every rank writes a part hold what an export to rank 0 holds."""
    from megatron_ext.learner import weights

    exported = _exported(learner)
    with mock.patch.multiple(weights, BUCKET_BYTES=1 << 14, SMALLEST_BYTES=1 << 12):  # enough for all ranks
        _check_staged_by_all(learner, parent, exported)


def _check_staged_by_all(learner: Learner, parent: Path, exported: Results) -> None:
    from megatron_ext.sync.base import Clock, stage_weights
    from megatron_ext.sync.disk import DiskSync
    from megatron_ext.sync.receive import Update, read_verified
    from recipes.loop.spread import Spread

    spread, tensors = Spread(), learner.export(spread=True)
    if torch.distributed.get_rank():
        spread.write(tensors)
        return
    sync = DiskSync(parent)
    stage_weights(sync, 1, tensors, ranks=spread)
    assert sync.info is not None
    found = read_verified(Update(**sync.info), Clock({}))
    assert found.keys() == exported.keys() and all(torch.equal(found[name], exported[name]) for name in exported)
    writers = {name.split("-")[0] for name in sync.info["files"]}
    assert len(writers) == torch.distributed.get_world_size(), sync.info["files"]
    sync.close()


def _trained(variant: Variant, learner: Learner, objective: str, stats: TokenStats) -> Results:
    """Train three steps; ``stats`` belong to the initial weights."""
    from megatron_ext.rl.selection import build_selection
    from megatron_ext.rl.trace import TokenTrace

    number = list(OBJECTIVES).index(objective)
    name, params, selection = OBJECTIVES[objective]
    loss, order = build_loss(name, **params), list(variant.order)
    batch = cases.make_batch(learner.dtype, order)
    if learner.hf.experts is not None and objective in REPLAYED:
        layers = sum(map(learner.hf.sparse, range(learner.hf.num_layers)))
        batch.experts = cases.make_experts(order, layers, learner.hf.experts.count, learner.hf.experts.top_k)
        stats = learner.statistics(batch)
    out = {f"statistics/{name}": getattr(stats, name) for name in cases.FIELDS}
    batch.old_logp = stats.logp + batch.old_logp
    if selection is not None:
        _select(batch, stats, selection)
        out["selected"] = torch.stack([batch.keep.double(), batch.kl_coef.double()])
    batch.trace = TokenTrace(torch.arange(len(batch.mask)))
    for step, members in enumerate(MINI_BATCHES):
        mini = [order.index(i) for i in members]
        weights_B = cases.aggregation_weights(AGGREGATIONS[(number + step) % len(AGGREGATIONS)], mini, order)
        inside = build_selection("region", region="e3").inside if step == 2 else None
        result = learner.update(batch, mini, weights_B, loss, selection_inside=inside)
        for key, value in result.means.items() | {f"sum {k}": v for k, v in result.diagnostic_sums.items()}.items():
            kind = {"grad_norm": "norm", "loss": "loss", "pg_loss": "loss"}.get(key, "metric")
            out[f"{kind}/{step}/{key}"] = torch.tensor(value, dtype=torch.float64)
    learner.gather_trace(batch.trace)
    out["statistics/trace"] = batch.trace.sums
    out |= {f"weight/{k}": tensor for k, tensor in _exported(learner).items()}
    if objective == "ce_gppo":
        out["statistics/after"] = cases.stack(learner.statistics(batch))
    return {k: _recorded_order(k, v.double(), order) for k, v in out.items()}


def _selected(variant: Variant, stats: TokenStats, name: str) -> Tensor:
    batch = cases.make_batch(torch.float64, list(variant.order))
    _select(batch, stats, {"name": name, **SELECTIONS[name]})
    return _recorded_order("selected", batch.keep.double()[None], list(variant.order))


def _step(variant: Variant, learner: Learner, stats: TokenStats) -> tuple[Tensor, Results]:
    """Take and undo one step of SGD on the whole batch; return the reported norm and the applied gradient."""
    from megatron_ext.learner import weights

    batch, order = cases.make_batch(learner.dtype, list(variant.order)), list(variant.order)
    batch.old_logp = stats.logp + batch.old_logp
    before, everyone = _exported(learner), range(len(order))
    result = learner.update(
        batch, everyone, cases.aggregation_weights("token_mean", everyone, order), build_loss("ce_gppo")
    )
    moved = {name: (before[name] - tensor) / SGD_LR for name, tensor in _exported(learner).items()}
    weights.import_hf(learner.hf, learner.model_dir, learner.chunks)
    return torch.tensor(result.means["grad_norm"], dtype=torch.float64), moved


def _select(batch: TrainBatch, stats: Any, params: dict[str, Any]) -> None:
    """Select tokens as the training loop does."""
    from configs.schema import Config
    from megatron_ext.rl.selection import build_selection
    from recipes.loop.metrics import StepMetrics
    from recipes.train import select

    select(Config(), build_selection(**params), batch, stats, 0, range(len(batch.prompts)), StepMetrics(1))


def _recorded_order(name: str, values: Tensor, order: list[int]) -> Tensor:
    """Return the per-token values of a reordered batch to the recorded order."""
    if not name.startswith(("statistics", "selected")):
        return values
    starts = torch.tensor([0, *(cases.LENGTHS[i] for i in order)]).cumsum(0)
    return values[..., torch.cat([torch.arange(n) + starts[order.index(i)] for i, n in enumerate(cases.LENGTHS)])]
