"""Paths that the documentation names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "slurm" / "README.md"]
FOLDERS = "recipes|megatron_ext|conversion|configs|tests|benchmarks|docs|slurm|constraints"
PATH = re.compile(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*\w)(?![\w{{*])")
MADE_BY_THE_READER = {
    "slurm/site.env",
    "slurm/yours.sbatch",
    "megatron_ext/rl/losses/topr.py",
    "configs/loss/topr.yaml",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    named = set(PATH.findall(page.read_text(encoding="utf-8"))) - MADE_BY_THE_READER
    assert sorted(path for path in named if "NAME" not in path and not (ROOT / path).exists()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_exist(page: Path) -> None:
    """``python -m recipes.train`` and the like."""
    modules = set(re.findall(r"-m ((?:recipes|conversion|benchmarks)\.[\w.]*\w)", page.read_text(encoding="utf-8")))
    paths = {module: ROOT / module.replace(".", "/") for module in modules}
    assert sorted(m for m, path in paths.items() if not path.is_dir() and not path.with_suffix(".py").exists()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    files = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert sorted(link for link in files if not (page.parent / link).exists()) == []


def test_papers_are_cited_by_name() -> None:
    """Not by private numbers."""
    folders = ("recipes", "megatron_ext", "conversion", "configs", "benchmarks", "docs", "slurm", "tests")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".md", ".yaml", ".sbatch", ".sh")]
    assert len(files) > 400
    number = re.compile(r"\bP[0234]\b")
    assert [str(p.relative_to(ROOT)) for p in files if number.search(p.read_text(encoding="utf-8"))] == []
