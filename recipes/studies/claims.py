"""The claims of the papers, as comparisons that the results of the studies decide."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipes.studies.methods import BASELINE
from recipes.studies.results import Row
from recipes.studies.statistics import Interval, paired
from recipes.studies.summary import by_setting, values

CLIP, CE, FLEXIBLE, DYNAMICS = "Clip-Low/Clip-High", "CE-GPPO", "Flexible Entropy Control", "Entropy Dynamics"


@dataclass(frozen=True)
class Claim:
    """``metric`` of ``method`` is higher (or lower) than that of ``other``, over the same seeds."""

    paper: str
    text: str
    study: str
    method: str
    other: str
    """A method, or ``start``: the seed's value before training."""
    metric: str
    sign: int
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    claim: Claim
    setting: str
    difference: Interval
    p: float

    @property
    def verdict(self) -> str:
        """holds | the opposite | no difference found | too few seeds, at the 5 % level."""
        if math.isnan(self.p):
            return "too few seeds"
        if self.p >= 0.05:
            return "no difference found"
        return "holds" if self.difference.mean * self.claim.sign > 0 else "the opposite"


H, ACC, PASS = "final_entropy", "avg_at_k", "pass_at_k"
ONE, MANY = ("16 updates",), ("64 updates",)
BOTH = ONE + MANY
NETWORK = ("L2, 16 updates", "L2, 64 updates")
FULL = ("quick start, 4 epochs",)
RANDOM = ("random", "L2, random")


def _claims() -> list[Claim]:
    rows: list[tuple[str, str, str, str, str, str, int, tuple[str, ...]]] = []

    def add(paper: str, text: str, study: str, a: str, b: str, metric: str, sign: int, *settings: str) -> None:
        rows.append((paper, text, study, a, b, metric, sign, settings))

    r = "random_rewards"
    add(CLIP, "random rewards: symmetric clipping lowers entropy", r, BASELINE, "start", H, -1, *RANDOM)
    add(CLIP, "random rewards: without clipping entropy stays", r, "PPO, no clip", "start", H, +1, RANDOM[0])
    add(CLIP, "random rewards: symmetric clipping loses more entropy than none", r, BASELINE, "PPO, no clip", H, -1,
        RANDOM[0])  # fmt: skip
    add(CLIP, "random rewards: a small eps_low raises entropy", r, "eps_low 0.05", BASELINE, H, +1, *RANDOM)
    add(CLIP, "random rewards: clip-low off lowers entropy", r, "eps_low off", BASELINE, H, -1, *RANDOM)
    add(CLIP, "random rewards: clip-high off raises entropy", r, "eps_high off", BASELINE, H, +1, *RANDOM)
    add(CLIP, "random rewards: a small eps_high lowers entropy", r, "eps_high 0.05", BASELINE, H, -1, *RANDOM)
    study = "losses"
    for label, settings in (("", BOTH + NETWORK), ("full stack", FULL)):
        source = "full_stack" if label else study
        add(CLIP, "a small eps_low raises entropy", source, "eps_low 0.05", BASELINE, H, +1, *settings)
        add(CLIP, "clip-high off raises entropy", source, "eps_high off", BASELINE, H, +1, *settings)
        add(
            CLIP,
            "a small eps_low gains accuracy (paper: loses none)",
            source,
            "eps_low 0.05",
            BASELINE,
            ACC,
            +1,
            *settings,
        )
        add(CLIP, "a small eps_low gains pass@8", source, "eps_low 0.05", BASELINE, PASS, +1, *settings)
        add(CE, "(0, 1) raises entropy", source, "CE-GPPO (0, 1)", BASELINE, H, +1, *settings)
        add(CE, "(0, 1) gains accuracy", source, "CE-GPPO (0, 1)", BASELINE, ACC, +1, *settings)
    add(CLIP, "clip-low off lowers entropy", study, "eps_low off", BASELINE, H, -1, *BOTH)
    add(CLIP, "a small eps_high lowers entropy", study, "eps_high 0.05", BASELINE, H, -1, *BOTH)
    add(CE, "(0.5, 1) raises entropy", study, "CE-GPPO (0.5, 1)", BASELINE, H, +1, *BOTH, *NETWORK)
    add(CE, "(0.5, 1) gains accuracy", study, "CE-GPPO (0.5, 1)", BASELINE, ACC, +1, *BOTH, *NETWORK)
    add(CE, "more beta1 lowers entropy (beta2 1)", "betas", "CE-GPPO (1, 1)", "CE-GPPO (0, 1)", H, -1, *BOTH)
    add(CE, "more beta1 lowers entropy (beta2 0)", "betas", "CE-GPPO (1, 0)", BASELINE, H, -1, *BOTH)
    add(CE, "more beta2 raises entropy (beta1 0)", "betas", "CE-GPPO (0, 1)", BASELINE, H, +1, *BOTH)
    add(CE, "more beta2 raises entropy (beta1 1)", "betas", "CE-GPPO (1, 1)", "CE-GPPO (1, 0)", H, +1, *BOTH)
    add(CE, "CISPO is less accurate than CE-GPPO", study, "CISPO", "CE-GPPO (0.5, 1)", ACC, -1, *BOTH)
    add("DAPO", "clip-higher raises entropy", study, "clip-higher 0.28 (DAPO)", BASELINE, H, +1, *BOTH, *NETWORK)
    add(FLEXIBLE, "the dynamic upper bound raises entropy", study, "dynamic upper", BASELINE, H, +1, *BOTH, *NETWORK)
    add(FLEXIBLE, "the dynamic lower bound lowers entropy", study, "dynamic lower", BASELINE, H, -1, *BOTH, *NETWORK)
    add(FLEXIBLE, "a bound that depends on p beats a constant 0.28 in entropy", "flexible", "dynamic upper",
        "clip-higher 0.28 (DAPO)", H, +1, *BOTH)  # fmt: skip
    for strategy in ("ID", "DID"):
        name = f"{strategy} 0.5"
        add(FLEXIBLE, f"{strategy} gains accuracy", "flexible", name, BASELINE, ACC, +1, *BOTH)
        add(FLEXIBLE, f"{strategy} beats its static thresholds in accuracy", "flexible", name, f"{strategy}, static",
            ACC, +1, *BOTH)  # fmt: skip
    add(FLEXIBLE, "OD (floor 0.65) gains accuracy", "flexible", "OD 0.65", BASELINE, ACC, +1, *BOTH)
    for region, sign in (("E1", +1), ("E2", -1), ("E3", -1), ("E4", +1)):
        word = "raises" if sign > 0 else "lowers"
        add(FLEXIBLE, f"dropping {region} {word} entropy", "regions", f"drop {region}", "eps 0.3", H, sign, *BOTH)
        word = "lowers" if sign > 0 else "raises"
        add(FLEXIBLE, f"{region} alone {word} entropy", "regions", f"keep {region}", "eps 0.3", H, -sign, *BOTH)
    for advantage in (">", "<"):
        for region in (">", "<"):
            # Keeping a class moves entropy in one direction; dropping it moves entropy in the other.
            sign = -1 if advantage == region else +1
            kept = f"S{region}0, A{advantage}0"
            for mode, s in (("keep", sign), ("drop", -sign)):
                text = f"{mode} {kept}: entropy {'rises' if s > 0 else 'falls'} against all tokens"
                add(DYNAMICS, text, "discriminators", f"{mode} {kept}", BASELINE, H, s, *ONE)
    add(DYNAMICS, "Clip_B (mu 1) keeps entropy up", study, "Clip_B 1", BASELINE, H, +1, *BOTH, *NETWORK)
    add(DYNAMICS, "Clip_V (mu 1, two-sided) keeps entropy up", study, "Clip_V 1", BASELINE, H, +1, *BOTH, *NETWORK)
    add(DYNAMICS, "Clip_V (mu 1, lower side) keeps entropy up", "discriminators", "Clip_V 1, low side", BASELINE, H, +1,
        *ONE)  # fmt: skip
    add(DYNAMICS, "Clip_B (mu 1) gains accuracy", study, "Clip_B 1", BASELINE, ACC, +1, *BOTH, *NETWORK)
    add(DYNAMICS, "Clip_B (mu 1) gains pass@8", study, "Clip_B 1", BASELINE, PASS, +1, *BOTH, *NETWORK)
    return [Claim(*row) for row in rows]


CLAIMS = _claims()


def decide(claim: Claim, rows: list[Row]) -> list[Finding]:
    """One finding per setting that has results; ``rows`` are those of the claim's study."""
    found = []
    table = by_setting(rows)
    for setting in claim.settings:
        methods = table.get(setting, {})
        mine = values(methods.get(claim.method, []), claim.metric)
        if claim.other == "start":
            theirs = values(methods.get(BASELINE, []), claim.metric.replace("final", "start"))
        else:
            theirs = values(methods.get(claim.other, []), claim.metric)
        if mine.keys() & theirs.keys():
            found.append(Finding(claim, setting, *paired(mine, theirs)))
    return found
