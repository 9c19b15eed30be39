"""megatron_ext.rl is pure: no Megatron, no torch.distributed; its YAML configs match its dataclasses."""

from __future__ import annotations

import ast
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ext.rl.losses import LOSSES, build_loss
from megatron_ext.rl.schedules import SCHEDULES, build_controller
from megatron_ext.rl.selection import SELECTIONS, build_selection

ROOT = Path(__file__).parents[3]
RL = ROOT / "megatron_ext" / "rl"


@pytest.mark.parametrize("path", sorted(RL.rglob("*.py")), ids=lambda p: str(p.relative_to(RL)))
def test_no_module_names_a_process_group_or_megatron(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            assert name.split(".")[0] != "megatron" and not name.startswith("torch.distributed"), name


def group(name: str) -> list[Any]:
    return [pytest.param(path, id=path.stem) for path in sorted((ROOT / "configs" / name).glob("*.yaml"))]


def check_complete(path: Path, cls: type, not_configured: set[str]) -> dict[str, Any]:
    """The YAML lists every parameter; in the file named after it, with the dataclass's own default."""
    config = yaml.safe_load(path.read_text())
    assert path.read_text().startswith("# "), "the first line names the source"
    params = {f.name: f for f in fields(cls)}
    assert set(config) - {"name"} == set(params) - not_configured
    if path.stem == config["name"]:
        for key, f in params.items():
            if key not in not_configured:
                default = f.default if f.default_factory is MISSING else f.default_factory()
                assert config[key] == default, key
    return config


@pytest.mark.parametrize("path", group("loss"))
def test_loss_configs(path: Path) -> None:
    loss = LOSSES[yaml.safe_load(path.read_text())["name"]]
    config = check_complete(path, loss, set(loss.runtime))
    controller = build_controller(config["name"], config)
    build_loss(**{**config, **controller.loss_params(controller.init(), step=0, total_steps=10)})


@pytest.mark.parametrize("path", group("selection"))
def test_selection_configs(path: Path) -> None:
    build_selection(**check_complete(path, SELECTIONS[path.stem], set()))


@pytest.mark.parametrize("path", group("schedule"))
def test_schedule_configs(path: Path) -> None:
    config = check_complete(path, SCHEDULES[path.stem], {"signs"})
    build_controller("ce_gppo", {}, config.pop("name"), **config)


def test_every_name_has_a_config() -> None:
    for name, table in (("loss", LOSSES), ("selection", SELECTIONS), ("schedule", SCHEDULES)):
        assert set(table) <= {path.stem for path in (ROOT / "configs" / name).glob("*.yaml")}


def test_aliases_are_ppo() -> None:
    got = {}
    for alias in ("grpo", "dapo", "clip_higher", "clip_lower"):
        config = yaml.safe_load((ROOT / "configs" / "loss" / f"{alias}.yaml").read_text())
        got[alias] = (config["name"], config["eps_low"], config["eps_high"], config["dual_clip"])
    assert got == {
        "grpo": ("ppo", 0.2, 0.2, None),
        "dapo": ("ppo", 0.2, 0.28, None),
        "clip_higher": ("ppo", 0.2, 0.28, None),
        "clip_lower": ("ppo", 0.15, float("inf"), None),
    }
