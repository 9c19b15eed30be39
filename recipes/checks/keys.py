"""What ``--help`` says about keys: name, default, type or choices, and the remark beside it in the source."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

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


def section_help(section: str) -> str:
    """All keys of a section, one a paragraph. Raises ValueError for an unknown section."""
    if section not in SECTIONS:
        raise ValueError(f"--help {section}: there is no such section{near(section, SECTIONS)}; {', '.join(SECTIONS)}")
    if section not in TABLES:
        cls = get_type_hints(Config)[section]
        head = f"{section}.*  {' '.join((cls.__doc__ or '').split()).removesuffix('.')}"
        return "\n".join([head if not head.endswith(")") else f"{section}.*", *_lines(cls, f"{section}.")])
    out = [f"{section}=NAME  {', '.join(choices(section))}"]
    for name, cls in TABLES[section].items():
        out += [
            "",
            f"{section}.name={name}: {(cls.__doc__ or '').strip().splitlines()[0]}",
            *_lines(cls, f"{section}."),
        ]
    return "\n".join(out)


def _lines(cls: type, prefix: str) -> Iterator[str]:
    hints = get_type_hints(cls)
    for f in fields(cls):
        hint, key = hints[f.name], prefix + f.name
        if is_dataclass(hint):
            yield from _lines(hint, f"{key}.")  # type: ignore[arg-type]
        elif f.init and f.name not in getattr(cls, "runtime", ()):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            yield f"  {key}={_written(default)}  ({_kind(key, hint)})"
            if note := notes(cls).get(f.name):
                yield f"      {note}"


def _written(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value).replace(" ", "") if isinstance(value, (list, tuple, dict)) else f"{value}"


def _kind(key: str, hint: Any) -> str:
    null = " | null" if type(None) in get_args(hint) else ""
    if named := NAMES.get(key) or allowed(hint):
        return " | ".join(map(str, named)) + null
    plain = next((a for a in get_args(hint) if a is not type(None)), hint) if null else hint
    wanted = f", {ranges.wanted(key)}" if key in ranges.RANGES else ""
    words = {int: "whole number", float: "number", bool: "true | false", str: "text"}
    return words.get(plain, str(getattr(plain, "__name__", plain))) + wanted + null


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
            elif statement.end_lineno in comments:
                found[statement.target.id] = comments[statement.end_lineno]
    return found
