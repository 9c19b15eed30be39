"""The methods of the studies, by the name used in results and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from recipes.studies.engine import Method

INF = math.inf
BASELINE = "GRPO"


def _loss(name: str, /, **params: Any) -> dict[str, Any]:
    return {"name": name, **params}


def _ppo(eps_low: float = 0.2, eps_high: float = 0.2, **params: Any) -> dict[str, Any]:
    return _loss("ppo", eps_low=eps_low, eps_high=eps_high, **params)


def _ce(beta1: float, beta2: float, **params: Any) -> dict[str, Any]:
    return _loss("ce_gppo", beta1=beta1, beta2=beta2, eps_low=0.2, eps_high=0.2, **params)


def _dynamic(strategy: str, **params: Any) -> dict[str, Any]:
    return _loss("dynamic_clip", strategy=strategy, **params)


def _select(name: str, loss: Mapping[str, Any] | None = None, /, **params: Any) -> Method:
    return Method(loss=loss or _ppo(), selection={"name": name, **params})


TARGET = 0.8  # nats, between the start (1.40) and the end of GRPO at 16 updates per batch (0.54)
STATIC = {"alpha_high": 0.0, "b_high": 0.28, "alpha_low": 0.0, "b_low": 0.28}  # Flexible Entropy Control app. E.3

LOSSES: dict[str, Method] = {
    BASELINE: Method(loss=_ppo()),
    "REINFORCE": Method(loss=_loss("pg")),
    "PPO, no clip": Method(loss=_ppo(1.0, INF)),
    "dual clip 3": Method(loss=_ppo(dual_clip=3.0)),
    "clip-higher 0.28 (DAPO)": Method(loss=_ppo(0.2, 0.28)),
    "eps_high off": Method(loss=_ppo(0.2, INF)),
    "eps_high 0.05": Method(loss=_ppo(0.2, 0.05)),
    "eps_low 0.05": Method(loss=_ppo(0.05, 0.2)),
    "eps_low off": Method(loss=_ppo(1.0, 0.2)),
    "Clip-Low (0.15, off)": Method(loss=_ppo(0.15, INF)),
    "Clip-Lower 0.28": Method(loss=_ppo(0.28, 0.2)),
    "CE-GPPO (0, 1)": Method(loss=_ce(0.0, 1.0)),
    "CE-GPPO (0.5, 1)": Method(loss=_ce(0.5, 1.0)),
    "CE-GPPO (0.75, 1)": Method(loss=_ce(0.75, 1.0)),
    "CE-GPPO (0.5, 0)": Method(loss=_ce(0.5, 0.0)),
    "CE-GPPO (1, 0.5)": Method(loss=_ce(1.0, 0.5)),
    "CE-GPPO (1, 0.5), stop 0.3": Method(loss=_ce(1.0, 0.5, ratio_stop_low=0.3)),
    "CISPO": Method(loss=_loss("cispo")),
    "GSPO": Method(loss=_loss("gspo")),
    "SAPO": Method(loss=_loss("sapo")),
    "dynamic upper": Method(loss=_dynamic("upper")),
    "dynamic lower": Method(loss=_dynamic("lower")),
    "ID": Method(loss=_dynamic("id")),
    "DID": Method(loss=_dynamic("did")),
    "OD": Method(loss=_dynamic("od")),
    "ID, static": Method(loss=_dynamic("id", **STATIC)),
    "entropy target 0.6": Method(
        loss=_ce(0.5, 1.0), schedule={"name": "entropy_target", "curve": "constant", "start": 0.6}
    ),
    "ASPO": Method(loss=_loss("aspo")),
    "BAPO": Method(loss=_loss("bapo")),
    "DCPO": Method(loss=_loss("dcpo")),
    "GMPO": Method(loss=_loss("gmpo")),
    "Archer": Method(loss=_loss("archer")),
    "EntroPIC 0.8": Method(loss=_loss("entropic", target_entropy=TARGET)),
    "entropy-shaped": Method(loss=_loss("entropy_shaped")),
    "REPO-R": Method(loss=_loss("repo_r")),
    "QAE 0.4": Method(loss=_ppo(), advantage="qae"),
    "Dr. GRPO": Method(loss=_ppo(), advantage="dr_grpo"),
    "adaptive bonus 0.8": Method(loss=_ppo(), schedule={"name": "adaptive_entropy_bonus", "target": TARGET}),
    "automatic temperature 0.8": Method(loss=_ppo(), schedule={"name": "automatic_temperature", "target": TARGET}),
    "ERC (0.95, 1.05)": _select("entropy_ratio"),
    "Clip_B 2.5": _select("clip_b", mu_low=2.5),
    "Clip_B 1": _select("clip_b", mu_low=1.0),
    "Clip_V 2": _select("clip_v", mu_low=2.0, mu_high=2.0),
    "Clip_V 1": _select("clip_v", mu_low=1.0, mu_high=1.0),
    "Clip-Cov": _select("clip_cov"),
    "KL-Cov": _select("kl_cov", _ppo(1.0, INF)),
    "forking tokens 20 %": _select("forking"),
    "STEER": _select("steer"),
    "entropy bonus 0.003": _select("entropy_bonus", coef=0.003),
    "unlikely 0.25": _select("unlikely"),
}

HEADLINE = (
    BASELINE,
    "eps_low 0.05",
    "eps_high off",
    "clip-higher 0.28 (DAPO)",
    "CE-GPPO (0, 1)",
    "CE-GPPO (0.5, 1)",
    "CE-GPPO (1, 0.5)",
    "dynamic upper",
    "dynamic lower",
    "Clip_B 1",
    "Clip_V 1",
)


def _sweep() -> dict[str, Method]:
    names = {0.05: "0.05", 0.1: "0.1", 0.15: "0.15", 0.3: "0.3"}
    low = {f"eps_low {name}": Method(loss=_ppo(eps, 0.2)) for eps, name in names.items()}
    high = {f"eps_high {name}": Method(loss=_ppo(0.2, eps)) for eps, name in names.items()}
    rest = ("eps_low off", "eps_high off", "PPO, no clip", "CE-GPPO (0, 1)", "CE-GPPO (0.5, 1)", "CE-GPPO (1, 0.5)")
    return {BASELINE: LOSSES[BASELINE], **low, **high} | {
        name: LOSSES[name] for name in (*rest, "dynamic upper", "dynamic lower")
    }


def _betas() -> dict[str, Method]:
    grid = (0.0, 0.25, 0.5, 0.75, 1.0)
    return {BASELINE: LOSSES[BASELINE]} | {
        f"CE-GPPO ({b1:g}, {b2:g})": Method(loss=_ce(b1, b2)) for b1 in grid for b2 in grid if b1 or b2
    }


def _flexible() -> dict[str, Method]:
    plain = {name: LOSSES[name] for name in (BASELINE, "clip-higher 0.28 (DAPO)", "Clip-Lower 0.28", "dynamic upper")}
    plain |= {"dynamic lower": LOSSES["dynamic lower"], "dynamic both": Method(loss=_dynamic("both"))}
    for strategy in ("id", "did"):
        for ratio in (0.3, 0.4, 0.5, 0.6):
            plain[f"{strategy.upper()} {ratio:g}"] = Method(loss=_dynamic(strategy, phase_ratio=ratio))
        plain[f"{strategy.upper()}, static"] = Method(loss=_dynamic(strategy, **STATIC))
    plain["ID, printed ramp"] = Method(loss=_dynamic("id", lower_ramp="printed"))
    for floor in (0.2, 0.5, 0.65):
        plain[f"OD {floor:g}"] = Method(loss=_dynamic("od", entropy_floor=floor))
    plain["OD 0.65, static"] = Method(loss=_dynamic("od", entropy_floor=0.65, **STATIC))
    return plain


def _regions() -> dict[str, Method]:
    wide = _ppo(0.3, 0.3)
    return {BASELINE: LOSSES[BASELINE], "eps 0.3": Method(loss=wide)} | {
        f"{mode} {region.upper()}": _select("region", wide, region=region, mode=mode)
        for mode in ("drop", "keep")
        for region in ("e1", "e2", "e3", "e4")
    }


def _discriminators() -> dict[str, Method]:
    table = {BASELINE: LOSSES[BASELINE]}
    for advantage in ("positive", "negative"):
        for mode in ("keep", "drop"):
            for region, sign in (("s_positive", "S>0"), ("s_negative", "S<0")):
                name = f"{mode} {sign}, A{'>' if advantage == 'positive' else '<'}0"
                table[name] = _select("region", region=region, mode=mode, advantage=advantage)
    for mu in (0.25, 0.5, 1.0, 1.5, 2.5):
        table[f"Clip_B {mu:g}"] = _select("clip_b", mu_low=mu)
    for mu in (0.25, 0.5, 1.0, 2.0):
        table[f"Clip_V {mu:g}"] = _select("clip_v", mu_low=mu, mu_high=mu)
        table[f"Clip_V {mu:g}, low side"] = _select("clip_v", mu_low=mu, mu_high=INF)
    return table


def _targets() -> dict[str, Method]:
    actuators = {"eps": _ppo(), "beta": _ce(0.5, 1.0), "b": _dynamic("both")}
    curves: dict[str, dict[str, Any]] = {
        "step to 0.6": {"curve": "constant", "start": 0.6},
        "ramp 1 to 0.5": {"curve": "linear", "start": 1.0, "end": 0.5},
        "unreachable 1.5": {"curve": "constant", "start": 1.5},
    }
    table = {BASELINE: LOSSES[BASELINE]}
    for label, curve in curves.items():
        for name, loss in actuators.items():
            table[f"{label}, {name}"] = Method(loss=loss, schedule={"name": "entropy_target", **curve})
        wide = {"name": "entropy_target", **curve, "limits": {"eps_low": [0.01, 1.0], "eps_high": [0.01, 2.0]}}
        table[f"{label}, eps wide"] = Method(loss=_ppo(), schedule=wide)
    return table


RANDOM_REWARDS, BETAS, FLEXIBLE = _sweep(), _betas(), _flexible()
REGIONS, DISCRIMINATORS, TARGETS = _regions(), _discriminators(), _targets()
MAP = {
    name: LOSSES[name]
    for name in (BASELINE, "eps_low 0.05", "eps_high off", *[f"CE-GPPO ({b})" for b in ("0, 1", "0.5, 1", "1, 0.5")])
}
WHY = {name: LOSSES[name] for name in (BASELINE, "eps_low 0.05", "eps_high off", "CE-GPPO (0, 1)")}
PREDICTION = {
    name: LOSSES[name]
    for name in (
        BASELINE,
        "eps_low 0.05",
        "eps_high off",
        "CE-GPPO (0, 1)",
        "CE-GPPO (1, 0.5)",
        "dynamic upper",
        "GSPO",
        "Clip_B 1",
        "Clip_V 1",
    )
}


def overrides(method: Method) -> list[str]:
    """The method as ``key=value`` command-line words of `recipes.train`."""
    words = [] if method.advantage == "grpo" else [f"advantage.name={method.advantage}"]
    for group in ("loss", "selection", "schedule"):
        params = dict(getattr(method, group))
        words.append(f"{group}={params.pop('name')}")
        words += [f"{group}.{key}={value}" for key, value in params.items()]
    return words
