"""Every config line of docs/algorithms.md is a valid configuration, and every method has a line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from configs.load import choices
from megatron_ext.rl.advantages import ADVANTAGES
from megatron_ext.rl.aggregation import AGGREGATIONS
from recipes.checks.settings import load_checked
from recipes.studies import slopes

TEXT = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
LINES = re.findall(r'`make train ARGS="([^"]+)"`', TEXT)


@pytest.mark.parametrize("line", LINES)
def test_config_line_loads_and_is_what_it_says(line: str) -> None:
    overrides = shlex.split(line)
    config = load_checked(overrides)
    for item in overrides:
        key, _, value = item.partition("=")
        group, _, name = key.partition(".")
        if name and group in ("loss", "selection"):
            got = getattr(config, group)[name]
            assert str(got) == value or float(got) == float(value)


METHODS = {  # the five papers and their baselines; a user-defined loss needs no row
    "loss": {"pg", "grpo", "ppo", "dapo", "clip_lower", "ce_gppo", "cispo", "gspo", "sapo", "dynamic_clip"}
    | {"aspo", "bapo", "dcpo", "gmpo", "archer", "entropic", "entropy_shaped", "repo_r"},
    "selection": {"clip_b", "clip_v", "clip_cov", "kl_cov", "forking", "region", "entropy_bonus", "unlikely"}
    | {"entropy_ratio", "steer"},
    "schedule": {"none", "piecewise", "linear", "entropy_target", "adaptive_entropy_bonus"} | {"automatic_temperature"},
}


def test_every_method_is_in_the_tables() -> None:
    for group, methods in METHODS.items():
        shown = set(re.findall(rf"\b{group}=(\w+)", " ".join(LINES)))
        assert methods <= shown and methods <= set(choices(group))
    for name in (*ADVANTAGES, *AGGREGATIONS, "gae"):
        assert f"| `{name}` |" in TEXT


def test_the_table_of_entropy_changes_is_what_the_command_prints() -> None:
    """Equal except for the last digit: rounding may differ between machines."""
    for line in slopes.table().splitlines()[2:-2]:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        (row,) = [other for other in TEXT.splitlines() if other.startswith(f"| {name} | ") and " / " in other]
        shown = [cell.strip().split(" / ") for cell in row.strip("|").split("|")[1:]]
        computed = [cell.split(" / ") for cell in cells]
        for (a, b), (c, d) in zip(shown, computed, strict=True):
            assert float(a) == pytest.approx(float(c), abs=2e-4) and float(b) == pytest.approx(float(d), abs=2e-4)
