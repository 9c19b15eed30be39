"""From a command line to a :class:`configs.schema.Config`; all messages about malformed arguments are here.

    recipe=quickstart optim.lr=1e-6 loss=dapo loss.eps_high=0.3

Hydra composes the groups, OmegaConf checks types against the schema, and the parts of a run check their own parameters.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, field, fields, is_dataclass, make_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_module
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from configs.schema import Config

GROUPS = ("recipe", "loss", "selection", "schedule")
GROUP_CHOICE = tuple(f"{group}=" for group in GROUPS)
# Keys that the schema leaves to whoever they are for, and that are checked there.
FREE_KEYS = (
    "loss.",
    "selection.",
    "schedule.",
    "reward.params.",
    "advantage.params.",
    "eval.sets.",
    "run.hang_phases_s.",
)
SECTIONS = [f.name for f in fields(Config) if is_dataclass(get_type_hints(Config)[f.name]) or f.name in GROUPS]
FOLDER = Path(__file__).parent
_TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "int | None": "a whole number or null",
    "float | None": "a number or null",
    "str | None": "text or null",
    "list": "a list such as [1,2]",
    "dict": "a mapping such as {name: value}",
}


def choices(group: str) -> list[str]:
    """Names that ``group=NAME`` accepts."""
    folder = FOLDER / group
    found = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in found if not name.startswith("base/"))


def load_config(overrides: Sequence[str]) -> Config:
    """Compose and check a configuration.

    A loss, selection or schedule chosen by an override comes with its own defaults: what the recipe sets for *its*
    loss is not carried over, so that ``loss=dapo`` works in every recipe.

    Raises ValueError, in one sentence that names the key, for anything unknown, of the wrong type or impossible.
    """
    overrides = [_canonical(item) for item in overrides]
    for item in overrides:
        _check_key(item)
    # The YAML files hold only what differs from the schema's defaults, so Hydra must be told to add keys ("++"); that
    # they exist and have the right type is checked by merging into the schema.
    forced = [o if o.startswith(("~", *GROUP_CHOICE)) else f"++{o.lstrip('+')}" for o in overrides]
    try:
        with initialize_config_module("configs", version_base="1.3"):
            raw = compose("config", overrides=forced)
            for group in GROUPS:
                if group != "recipe" and any(o.startswith(f"{group}=") for o in overrides):
                    own = [o for o in forced if o.startswith((f"++{group}.", f"~{group}.", f"{group}="))]
                    raw[group] = compose("config", overrides=["~recipe", *own])[group]
        merged = OmegaConf.merge(_schema(), raw)
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, overrides)) from error
    config: Config = _build(Config, values)
    given = {item.lstrip("+").partition("=")[0] for item in overrides}
    if "eval.n" in given and "eval.k" not in given and config.eval.n >= 1:
        # The recipe's k, of which fewer samples leave some without meaning.
        config.eval.k = sorted({k if k <= config.eval.n else config.eval.n for k in config.eval.k})
    return config


def _canonical(item: str) -> str:
    """An override with the full name of its key, where it has a short one; one suite is a list of one."""
    item = re.sub(r"^resume=", "resume.checkpoint=", item)
    item = re.sub(r"^suite=", "eval.suite=", item)
    return re.sub(r"^eval\.suite=(?!null$)([^\[\s]+)$", r"eval.suite=[\1]", item)


@cache
def _schema() -> DictConfig:
    return OmegaConf.structured(_plain(Config))


@cache
def _plain(cls: type) -> type:
    """The dataclass with text in place of `Literal`, which OmegaConf does not know."""
    members: list[tuple[str, Any, Any]] = []
    for name, hint in get_type_hints(cls).items():
        default = next(f for f in fields(cls) if f.name == name)
        if is_dataclass(hint):
            plain = _plain(hint)  # type: ignore[arg-type]
            members.append((name, plain, field(default_factory=plain)))
        else:
            new = field(default=default.default, default_factory=default.default_factory)
            text = (str | None if type(None) in get_args(hint) else str) if allowed(hint) else hint
            text = list[str] if get_origin(hint) is list and allowed(hint) else text
            members.append((name, text, new))
    return make_dataclass(cls.__name__, members)


def _build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass made of plain values of the right types. Raises ValueError for a choice that does not exist."""
    made = {}
    for name, hint in get_type_hints(cls).items():
        key, value = prefix + name, values[name]
        if is_dataclass(hint):
            value = _build(hint, value, f"{key}.")  # type: ignore[arg-type]
        elif (choice := allowed(hint)) and get_origin(hint) is list:
            if wrong := [item for item in value if item not in choice]:
                listed = ", ".join(choice)
                raise ValueError(f"{key}={value}: {wrong[0]!r} is unknown{near(wrong[0], choice)}; choose {listed}")
        elif choice and value not in choice and (value is not None or type(None) not in get_args(hint)):
            null = " | null" if type(None) in get_args(hint) else ""
            raise ValueError(f"{key}={value} is unknown{near(str(value), choice)}; choose {' | '.join(choice)}{null}")
        made[name] = value
    return cls(**made)


def allowed(hint: Any) -> tuple[str, ...]:
    """The values of a `Literal`, of one that may be None, or of a list of them; empty for any other type."""
    if get_origin(hint) in (Union, UnionType, list):
        return tuple(value for option in get_args(hint) for value in allowed(option))
    return get_args(hint) if get_origin(hint) is Literal else ()


def _check_key(item: str) -> None:
    """Raises ValueError unless an override is ``key=value`` with a key that exists."""
    key, equals, value = item.lstrip("+~").partition("=")
    known = list(_keys(Config))
    if item.startswith("~") and key.startswith(FREE_KEYS):
        return  # takes an entry away, such as ~schedule.points.beta1
    if not equals:
        hint = f"; give {key} a value" if key in known else near(key, known)
        raise ValueError(f"argument {item!r} is not of the form key=value{hint}")
    if key in GROUPS:
        if value not in choices(key):
            listed = "--help lists all" if key == "recipe" else f"choose {', '.join(choices(key))}"
            raise ValueError(f"{key}={value} is unknown{near(value, choices(key))}; {listed}")
    elif not key.startswith(FREE_KEYS) and key.split("[")[0] not in known:
        raise ValueError(f"{item}: there is no key {key!r}{near(key, known)}; docs/keys.md lists all keys")
    elif key in SECTIONS:
        example = next(name for name in known if name.startswith(f"{key}."))
        raise ValueError(f"{item}: {key} is a section; set its keys one by one, as in {example}=...")


def save_config(config: Config, path: Path) -> None:
    """The resolved configuration as YAML."""
    path.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def load_saved_config(path: Path) -> Config:
    """What :func:`save_config` wrote."""
    try:
        values: Any = OmegaConf.to_container(OmegaConf.merge(_schema(), OmegaConf.load(path)), resolve=True)
        return _build(Config, values)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is not a configuration of this version ({first}): continue with the version that wrote it, or "
            "set run.dir to a new directory"
        ) from error


def _keys(cls: type) -> Iterator[str]:
    """Dotted names of all keys, sections included."""
    for key, _ in _types(cls):
        yield key


def _types(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, type in words) of all keys."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        hint = hints[f.name]
        words = "one of " + ", ".join(allowed(hint)) if allowed(hint) else str(getattr(hint, "__name__", hint))
        yield prefix + f.name, _TYPE_WORDS.get(words, words)
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _types(hint, f"{prefix}{f.name}.")


def near(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence out of what Hydra and OmegaConf say, with key, value and what to do."""
    text = str(error) if error.__cause__ is None else str(error.__cause__)
    if isinstance(error, OverrideParseException):
        return f"{error.override.lstrip('+')} cannot be read: quote special characters, as in \"key='a, b'\""
    if ambiguous := re.match(r"Ambiguous value for argument '\+*(.+?)'", text):
        return f"{ambiguous[1]}: one value is needed; write a list as [a,b], and quote a comma in text: key='a,b'"
    first = re.split(r"\n\s*(?:full_key|object_type|reference_type|See )", text)[0].strip().replace("\n", " ")
    match = re.search(r"full_key: (\S+)", text)
    if match is None:
        return first
    given = [o.partition("=")[2] for o in overrides if o.lstrip("+").partition("=")[0] == match[1]]
    value = given[-1] if given else None  # the last override of a key counts
    if value is None:
        return f"{match[1]}: {first}"
    wanted = {key: name for key, name in _types(Config)}.get(match[1], "another type")
    return f"{match[1]}={value} is not of the right type: give {wanted}"
