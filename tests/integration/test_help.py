"""``--help`` of every command: it exits with 0, prints the usage, and explains every option."""

from __future__ import annotations

import re
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Started by other programs, by path or under torchrun, not by users.
INTERNAL = {
    "megatron_ext.learner.logits",
    "megatron_ext.sync.ipc",
    "megatron_ext.sync.process_guard",
    "recipes.cluster.foreground",
    "recipes.cluster.beat",
    "recipes.rewards.worker",
}


def _modules() -> list[str]:
    files = [path for folder in ("recipes", "conversion", "megatron_ext") for path in (ROOT / folder).rglob("*.py")]
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in files]
    runs = [name for name, path in zip(names, files, strict=True) if 'if __name__ == "__main__"' in path.read_text()]
    return sorted(name for name in runs if name not in INTERNAL)


def _help(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[object, str, str]:
    """Run ``python -m name --help`` in this process; return its exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    out, err = capsys.readouterr()
    return left.value.code or 0, out, err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", _modules())
def test_help(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = _help(name, capsys, monkeypatch)
    lines = out.splitlines()
    assert code == 0 and err == "", err
    assert lines[0].startswith("usage: ") and name.rsplit(".")[-1] in lines[0], lines[0]
    assert len(lines) >= 6 and max(map(len, lines)) <= 120
    # argparse: an option without help text is alone on its line, and the next line has another option
    listed = out[out.index("options:") :].splitlines() if "\noptions:" in out else []
    pairs = pairwise([*listed, ""])
    alone = [(a, b) for a, b in pairs if re.match(r"  -\S", a) and not re.search(r"\S  +\S", a.strip())]
    bare = [a for a, b in alone if not b.startswith(" " * 10)]
    assert bare == [], "options without a word about what they do"
