"""Write ``docs/keys.md``, the reference of all keys, from the schema and the dataclasses that ``--help`` reads.

make keys      or      python -m recipes.checks.reference docs/keys.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import yaml

from configs import load
from recipes.checks.keys import Group, groups, top_level

HEAD = """# Keys

Every key of a run, with type, default and meaning. Give keys on the command line as `key=value`
(`make train ARGS="optim.lr=1e-6 loss=dapo"`), or in a recipe under `configs/recipe/`. A misspelled key fails with a
suggestion. `python -m recipes.train --help SECTION` prints the same text.

This page is generated: `make keys` writes it from `configs/schema.py` and from the dataclasses of the losses,
selections and schedules (`megatron_ext/rl/`). A test compares the two.

Defaults are those of the schema. `recipe=quickstart` and the other recipes set some of them to other values.
"""


def page() -> str:
    """The whole page, Markdown."""
    parts = [HEAD, _toc(), "## Top level\n", _table(top_level())]
    for section in load.SECTIONS:
        first, *entries = groups(section)
        parts.append(f"## {section}\n")
        if not entries:
            parts += [f"{_sentence(first.about)}\n"] if first.about else []
            parts.append(_table(first))
            continue
        parts += [f"Choose one with `{section}=NAME`.\n", *_presets(section)]
        if first.keys:
            parts += [f"Keys of every {section}:\n", _table(first)]
        for entry in entries:
            name = entry.title.partition("=")[2]
            source = f"{_sentence(_about(section, name))}\n"
            parts += [f"### {section}: {name}\n", source, f"{_sentence(entry.about)}\n"]
            parts += [_table(entry)] if entry.keys else []
    return "\n".join(parts).rstrip() + "\n"


def _toc() -> str:
    return "Sections: " + ", ".join(f"[{name}](#{name})" for name in load.SECTIONS) + ".\n"


def _sentence(text: str) -> str:
    return text if text.endswith((".", ":")) else f"{text}."


def _table(group: Group) -> str:
    rows = [(f"`{key.name}`", f"`{key.default}`", _code(key.kind), key.note) for key in group.keys]
    return _markdown(("key", "default", "type", "meaning"), rows)


def _code(kind: str) -> str:
    """Alternatives separated by commas: a vertical bar would end the cell."""
    return kind.replace(" | ", ", ")


def _presets(section: str) -> list[str]:
    """A table of the names that set the parameters of another entry, such as ``loss=dapo``; empty where none does."""
    rows = []
    for name in load.choices(section):
        entry, *values = (f"{key}={_yaml(value)}" for key, value in yaml.safe_load(_text(section, name)).items())
        if entry != f"name={name}":
            words = " ".join(f"`{section}.{word}`" for word in (entry, *values))
            rows.append((f"`{section}={name}`", words, _about(section, name)))
    return [_markdown(("name", "sets", "about"), rows)] if rows else []


def _yaml(value: object) -> str:
    return "null" if value is None else str(value)


def _text(section: str, name: str) -> str:
    return (load.FOLDER / section / f"{name}.yaml").read_text(encoding="utf-8")


def _about(section: str, name: str) -> str:
    """The comment at the top of an entry's YAML, which names its source."""
    lines = takewhile(lambda line: line.startswith("#"), _text(section, name).splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def _markdown(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m recipes.checks.reference", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="the Markdown file to write, such as docs/keys.md (`make keys`)")
    parser.parse_args().out.write_text(page(), encoding="utf-8")
