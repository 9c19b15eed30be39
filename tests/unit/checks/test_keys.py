"""The reference of all keys comes from the schema and the dataclasses, and is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import SECTIONS
from recipes.checks import keys, reference

PAGE = Path(reference.__file__).parents[2] / "docs" / "keys.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.page(), "run `make keys`"


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_a_meaning(section: str) -> None:
    assert [key.name for group in keys.groups(section) for key in group.keys if not key.note] == []


def test_help_and_page_name_the_same_keys() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for section in SECTIONS:
        for group in keys.groups(section):
            for key in group.keys:
                assert f"  {key.name}={key.default}  ({key.kind})" in keys.section_help(section)
                assert f"| `{key.name}` | `{key.default}` |" in page
    assert "| `seed` |" in page and "| `logging` |" in page


def test_types_and_defaults_read_as_on_the_command_line() -> None:
    """Expected values are written by hand, from the schema's type hints."""
    found = {key.name: key for section in SECTIONS for group in keys.groups(section) for key in group.keys}
    assert found["optim.betas"].kind == "list of numbers, at least 0 and below 1"
    assert found["rollout.quantization"].kind == "fp8 | null" and found["rollout.quantization"].default == "null"
    assert found["schedule.points"].default == "{beta1:[[0,0.0],[585,0.5]]}"
    assert "null" in found["train.tis_cap"].note and "None" not in found["train.tis_cap"].note
    assert "schedule.signs" not in found and "loss.total_steps" not in found, "set by the run, not by the user"
