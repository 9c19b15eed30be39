"""What ``--help`` says about keys: name, default, type or choices, and the remark beside it in the source."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from configs.load import SECTIONS, allowed, choices, near
from configs.schema import Config
from megatron_ext.rl.advantages import ADVANTAGES
from megatron_ext.rl.aggregation import AGGREGATIONS
from megatron_ext.rl.losses import LOSSES
from megatron_ext.rl.losses.kl import KL_TYPES
from megatron_ext.rl.schedules import SCHEDULES
from megatron_ext.rl.selection import SELECTIONS
from recipes.checks import ranges
from recipes.rewards.verifiers import VERIFIERS

# Names that are looked up in a table instead of being written out in the schema.
NAMES: dict[str, tuple[str, ...]] = {
    "advantage.name": (*ADVANTAGES, "gae"),
    "advantage.aggregation": tuple(AGGREGATIONS),
    "reference.kl_type": tuple(KL_TYPES),
    "reward.name": (*VERIFIERS, "package.module:function"),
}
TABLES: dict[str, dict[str, type]] = {"loss": LOSSES, "selection": SELECTIONS, "schedule": SCHEDULES}


@dataclass(frozen=True)
class Key:
    """One key: its full name, default and type as the command line writes them, and the remark in the source."""

    name: str
    default: str
    kind: str
    note: str


@dataclass(frozen=True)
class Group:
    """Keys that belong together: a section of the schema, or one loss, selection or schedule."""

    title: str
    about: str
    keys: tuple[Key, ...]


def groups(section: str) -> list[Group]:
    """The keys of a section. In ``loss``, ``selection`` and ``schedule``: those that all entries have, then per entry.

    Raises ValueError for an unknown section.
    """
    if section not in SECTIONS:
        raise ValueError(f"--help {section}: there is no such section{near(section, SECTIONS)}; {', '.join(SECTIONS)}")
    prefix = f"{section}."
    if section not in TABLES:
        cls = get_type_hints(Config)[section]
        generated = (cls.__doc__ or "").startswith(f"{cls.__name__}(")  # by dataclass, where the class has no docstring
        about = "" if generated else " ".join((cls.__doc__ or "").split()).removesuffix(".")
        return [Group(f"{section}.*", about, tuple(_keys(cls, prefix)))]
    table = {name: tuple(_keys(cls, prefix)) for name, cls in TABLES[section].items()}
    common = tuple(key for key in next(iter(table.values())) if all(key in keys for keys in table.values()))
    out = [Group(f"{section}=NAME", ", ".join(choices(section)), common)]
    for name, keys in table.items():
        about = (TABLES[section][name].__doc__ or "").strip().splitlines()[0]
        out.append(Group(f"{prefix}name={name}", about, tuple(key for key in keys if key not in common)))
    return out


def section_help(section: str) -> str:
    """All keys of a section, one a paragraph. Raises ValueError for an unknown section."""
    return "\n\n".join(_paragraph(group) for group in groups(section))


def _paragraph(group: Group) -> str:
    lines = [f"{group.title}  {group.about}".rstrip()]
    for key in group.keys:
        lines += [f"  {key.name}={key.default}  ({key.kind})", *([f"      {key.note}"] if key.note else [])]
    return "\n".join(lines)


def top_level() -> Group:
    """The keys outside all sections."""
    own = (f.name for f in fields(Config) if f.name not in SECTIONS)
    return Group("top level", "", tuple(key for name in own for key in _keys(Config, "", only=name)))


def _keys(cls: type, prefix: str, only: str | None = None) -> Iterator[Key]:
    hints = get_type_hints(cls)
    for f in fields(cls):
        hint, name = hints[f.name], prefix + f.name
        if only not in (None, f.name):
            continue
        if is_dataclass(hint):
            yield from _keys(hint, f"{name}.")  # type: ignore[arg-type]
        elif f.init and f.name not in getattr(cls, "runtime", ()):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            note = notes(cls).get(f.name, "")
            note = re.sub(r"\b(None|True|False)\b", lambda word: _WRITTEN[word[0]], note)
            yield Key(name, _written(default), _kind(name, hint), note)


_WRITTEN = {"None": "null", "True": "true", "False": "false"}  # Python's word -> YAML's, which users type


def _written(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return _WRITTEN[str(value)]
    return str(value).replace(" ", "").replace("'", "") if isinstance(value, (list, tuple, dict)) else str(value)


def _kind(key: str, hint: Any) -> str:
    null = " | null" if type(None) in get_args(hint) else ""
    if named := NAMES.get(key) or (() if get_origin(hint) is list else allowed(hint)):
        return " | ".join(map(str, named)) + null
    plain = next((a for a in get_args(hint) if a is not type(None)), hint) if null else hint
    wanted = f", {ranges.wanted(key)}" if key in ranges.RANGES else ""
    return _type(plain) + wanted + null


_TYPES = {int: "whole number", float: "number", bool: "true | false", str: "text", Any: "any value", dict: "mapping"}


def _type(hint: Any) -> str:
    origin = get_origin(hint) or hint
    if origin is list:
        inner = allowed(get_args(hint)[0])
        return f"list of {' | '.join(map(str, inner))}" if inner else f"list of {_PLURAL[get_args(hint)[0]]}"
    return _TYPES[dict if origin is Mapping else origin]


_PLURAL = {int: "whole numbers", float: "numbers", str: "texts", Any: "mappings"}


@cache
def notes(cls: type) -> dict[str, str]:
    """Field -> the comment behind it or the string under it, in the class and its bases."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        source = inspect.getsource(base)
        comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        (tree,) = ast.parse(source).body
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            under = following.value if isinstance(following, ast.Expr) else None
            if isinstance(under, ast.Constant) and isinstance(under.value, str):
                found[statement.target.id] = " ".join(under.value.split())
            else:
                lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
                found[statement.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found
