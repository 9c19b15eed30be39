"""The studies: the methods, settings and seeds of each, and the question that it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from recipes.studies import methods
from recipes.studies.engine import Method, Setting

MILD = Setting()  # 16 updates per batch: at most 1 % of tokens are clipped under GRPO
MANY = Setting(epochs=4, lr=0.03)  # 64 updates per batch: 7 % clipped below and 3 % above
MILD_L2 = Setting(level="L2", steps=60, lr=0.0005)
MANY_L2 = Setting(level="L2", steps=60, epochs=4, lr=0.001)
Value = TypeVar("Value")
ONE, BOTH = {"16 updates": MILD}, {"16 updates": MILD, "64 updates": MANY}


@dataclass(frozen=True, kw_only=True)
class Study:
    """One results file and one page."""

    title: str
    question: str
    settings: Mapping[str, Setting]
    methods: Mapping[str, Method]
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Setting or level -> the methods that it runs. Settings that are not listed run all methods."""
    seeds: Mapping[str, int]
    """Setting or level -> number of seeds."""
    probe: str = ""
    """One of `probes.PROBES`."""
    curves: bool = True
    """Whether to store the mean curves of every method for the page."""

    def of(self, label: str) -> dict[str, Method]:
        chosen = _either(self.only, label, self.settings[label].level)
        return {name: self.methods[name] for name in chosen or self.methods}

    def seeds_of(self, label: str) -> int:
        return _either(self.seeds, label, self.settings[label].level) or 0


def _either(table: Mapping[str, Value], label: str, level: str) -> Value | None:
    return table.get(label, table.get(level))


def _grid(level: str, rates: tuple[float, ...], updates: tuple[int, ...], steps: int) -> dict[str, Setting]:
    """Settings for updates per batch x learning rate: at most 16 mini-batches per pass, more updates by more passes."""
    grid = {}
    for count in updates:
        for lr in rates:
            size, epochs = min(count, 16), max(1, count // 16)
            setting = Setting(level=level, steps=steps, mini_batches=size, epochs=epochs, lr=lr)
            grid[f"{level} {count} x {lr:g}"] = setting
    return grid


# 64 updates per batch with other optimizers, to separate the effect of Adam from that of clipping. AMSGrad's second
# moment never falls after a large gradient, and a large eps keeps small gradients small.
OPTIMIZERS = {
    "Adam (0.9, 0.95)": MANY,
    "Adam (0, 0.95)": replace(MANY, betas=(0.0, 0.95)),
    "Adam (0.9, 0.999)": replace(MANY, betas=(0.9, 0.999)),
    "AMSGrad (0.9, 0.95)": replace(MANY, optimizer="amsgrad"),
    "Adam (0.9, 0.95), eps 1e-3": replace(MANY, eps=1e-3),
    **{f"SGD {lr:g}": replace(MANY, optimizer="sgd", lr=lr) for lr in (3.0, 30.0)},
}


STUDIES: dict[str, Study] = {
    "losses": Study(
        title="All losses and selections on the same start",
        question="How much entropy does each method keep, at which accuracy, and which learn at many updates?",
        settings={**BOTH, "L2, 16 updates": MILD_L2, "L2, 64 updates": MANY_L2},
        methods=methods.LOSSES,
        only={"L2, 64 updates": methods.HEADLINE},
        seeds={"L1": 64, "L2": 20, "L2, 64 updates": 12},
    ),
    "random_rewards": Study(
        title="Clipping without a learning signal",
        question="With random rewards, does clip-low raise and clip-high lower entropy (Clip-Low/Clip-High fig. 3)?",
        settings={
            "random": replace(MILD, reward="random", steps=60),
            "L2, random": replace(MILD_L2, reward="random", steps=60),
        },
        methods=methods.RANDOM_REWARDS,
        only={"L2": ("GRPO", "eps_low 0.05", "eps_low off", "eps_high 0.05", "eps_high off", "CE-GPPO (0, 1)")},
        seeds={"L1": 64, "L2": 20},
    ),
    "betas": Study(
        title="CE-GPPO over beta1 and beta2",
        question="Does entropy fall with beta1 and rise with beta2?",
        settings=BOTH,
        methods=methods.BETAS,
        seeds={"L1": 32},
    ),
    "flexible": Study(
        title="Dynamic clipping: ID, DID, OD, phase ratios, static thresholds",
        question="Do the schedules move entropy as intended, and does a threshold that depends on p add anything?",
        settings=BOTH,
        methods=methods.FLEXIBLE,
        seeds={"L1": 32},
    ),
    "regions": Study(
        title="E1 to E4 of Flexible Entropy Control",
        question="Does dropping E1 or E4 raise entropy, and dropping E2 or E3 lower it?",
        settings=BOTH,
        methods=methods.REGIONS,
        seeds={"L1": 32},
    ),
    "discriminators": Study(
        title="The sign of S, Clip_B and Clip_V over mu",
        question="Does the sign of S decide whether entropy rises, and does mu set how much is kept?",
        settings=ONE,
        methods=methods.DISCRIMINATORS,
        seeds={"L1": 32},
    ),
    "targets": Study(
        title="A closed loop on entropy",
        question="Does entropy follow a step and a ramp, and what happens when a target cannot be reached?",
        settings=ONE,
        methods=methods.TARGETS,
        seeds={"L1": 32},
    ),
    "map": Study(
        title="Stability over updates per batch and learning rate",
        question="Where does each method stop learning, and is the limit the same with shared weights?",
        settings=_grid("L1", (0.0125, 0.025, 0.05, 0.1), (4, 16, 64, 192), 60)
        | _grid("L2", (0.0005, 0.001, 0.002), (4, 16, 64, 192), 40),
        methods=methods.MAP,
        only={"L2": ("GRPO", "eps_low 0.05", "CE-GPPO (0, 1)")},
        seeds={"L1": 16, "L2": 6},
        curves=False,
    ),
    "why": Study(
        title="Causes of the collapse at many updates",
        question="At 64 updates per batch, does clipping cause the collapse, or Adam on clipped gradients?",
        settings=OPTIMIZERS,
        methods=methods.WHY,
        seeds={"L1": 16},
        curves=False,
    ),
    "passes": Study(
        title="What each pass over a batch does",
        question="At 64 updates per batch, do later passes undo the first, and what does the clip keep of rewards?",
        settings={name: replace(s, steps=30) for name, s in OPTIMIZERS.items() if s.optimizer != "sgd"},
        methods=methods.WHY,
        seeds={"L1": 16},
        probe="passes",
        curves=False,
    ),
    "prediction": Study(
        title="Predicted against measured change of entropy",
        question="Does the first-order formula predict each step's change of entropy, under SGD and under Adam?",
        settings={
            "L1, SGD": replace(MILD, optimizer="sgd", lr=3.0),
            "L1, Adam": MILD,
            "L2, SGD": replace(MILD_L2, optimizer="sgd", lr=0.1),
            "L2, Adam": MILD_L2,
        },
        methods=methods.PREDICTION,
        only={"L2": ("GRPO", "eps_low 0.05", "CE-GPPO (0, 1)", "GSPO", "Clip_V 1")},
        seeds={"L1": 16, "L2": 8},
        probe="entropy",
        curves=False,
    ),
}
