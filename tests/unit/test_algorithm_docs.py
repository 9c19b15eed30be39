"""Every config line of docs/algorithms.md is a configuration that would start, and every method has a line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from configs.load import choices, load_config
from megatron_ext.rl.advantages import ADVANTAGES
from megatron_ext.rl.aggregation import AGGREGATIONS

TEXT = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
LINES = re.findall(r'`make train ARGS="([^"]+)"`', TEXT)


@pytest.mark.parametrize("line", LINES)
def test_config_line_loads_and_is_what_it_says(line: str) -> None:
    overrides = shlex.split(line)
    config = load_config(overrides)
    for item in overrides:
        key, _, value = item.partition("=")
        group, _, name = key.partition(".")
        if name and group in ("loss", "selection"):
            got = getattr(config, group)[name]
            assert str(got) == value or float(got) == float(value)


def test_every_method_is_in_the_tables() -> None:
    for group in ("loss", "selection", "schedule"):
        shown = set(re.findall(rf"\b{group}=(\w+)", " ".join(LINES)))
        assert set(choices(group)) - shown <= {"none", "clip_higher"}  # clip_higher is dapo
    for name in (*ADVANTAGES, *AGGREGATIONS, "gae"):
        assert f"| `{name}` |" in TEXT
