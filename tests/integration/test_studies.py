"""Studies as configurations of real runs."""

from __future__ import annotations

import re

from configs.load import load_config
from recipes.studies import evidence
from recipes.studies.definitions import STUDIES
from recipes.studies.full_stack import FULL_STUDIES
from recipes.studies.methods import overrides


def test_methods_and_studies_are_configurations() -> None:
    """Every method of a full-stack study is a valid command line of `recipes.train`; every study has GRPO."""
    for study in FULL_STUDIES.values():
        for method in study.methods.values():
            config = load_config([*study.words, *overrides(method)])
            assert config.loss["name"] == method.loss["name"]
    for study in STUDIES.values():
        assert "GRPO" in study.methods
        assert all(set(names) <= set(study.methods) for names in study.only.values())


def test_the_tables_of_the_evidence_are_those_of_the_results() -> None:
    """docs/evidence.md equals the output of `make study STUDY=evidence` on the committed results."""
    text = evidence.DOCUMENT.read_text(encoding="utf-8")
    assert evidence.fill(text, evidence.reader()) == text
    for name in re.findall(r"figures/(\w+)\.png", text):
        assert (evidence.FIGURES / f"{name}.png").is_file(), name
