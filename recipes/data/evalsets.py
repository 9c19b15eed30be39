"""The evaluation sets of a run, each with its protocol: files, suites, or problems held out from training."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from configs.schema import Config
from megatron_ext.rl.types import Problem
from recipes.data.files import EVAL_SPLITS
from recipes.data.sources import encode_prompt, read_problems
from recipes.data.suites import BENCHMARKS, Protocol, named_sets

_EXTENSIONS = (".jsonl", ".jsonl.gz", ".parquet", ".json", "")  # "": a directory
_INTEGERS = {"n": 1, "max_tokens": 1, "top_k": 0, "problems": 1, "every": 0}  # smallest value


@dataclass
class EvalSet:
    """Problems that are evaluated together, and counts of those that are not."""

    name: str
    protocol: Protocol
    problems: list[Problem]
    total: int  # problems in the file, before anything was dropped or left out
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    origin: str = ""  # the file's name
    note: str = ""  # a warning for readers of the numbers

    @property
    def counts(self) -> dict[str, Any]:
        """Numbers of problems in total, evaluated and left out, with reasons."""
        left_out = self.total - len(self.problems) - sum(self.dropped.values())
        return {
            "total": self.total,
            "evaluated": len(self.problems),
            "dropped": dict(self.dropped),
            "left_out": left_out,  # by eval.problems
        }

    @property
    def summary(self) -> str:
        """Such as ``30 of 30 problems`` or ``128 of 500 problems, 2 dropped (prompt too long: 2)``."""
        text = f"{len(self.problems)} of {self.total} problems"
        if self.dropped:
            reasons = ", ".join(f"{reason}: {number}" for reason, number in self.dropped.items())
            text += f", {sum(self.dropped.values())} dropped ({reasons})"
        return text


def eval_paths(config: Config) -> list[Path]:
    """``data.eval_path`` as a list. Raises ValueError when it is neither a path nor a list of paths."""
    given = config.data.eval_path
    given = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(path, str) and path for path in given):
        raise ValueError(f"data.eval_path={config.data.eval_path} must be a file or a list of files, as in [a, b]")
    if repeated := [path for path, number in Counter(given).items() if number > 1]:
        raise ValueError(f"data.eval_path names {repeated[0]} twice; give every file once")
    return [Path(path) for path in given]


def check_sets(config: Config) -> None:
    """Refuse unknown suites, missing files and impossible protocols, without reading any problem."""
    eval_paths(config)
    names = list(protocols(config))
    for name in config.eval.sets:
        if name != "all" and name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"eval.sets.{name}: there is no such set{hint}; this run has {', '.join(names)}, or all")
    if config.eval.best is not None:
        known = [label for name, p in protocols(config).items() for label in metric_names(name, p)]
        if config.eval.best not in known:
            close = difflib.get_close_matches(config.eval.best, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"eval.best={config.eval.best} is not measured{hint}; choose {', '.join(known)}")
    if config.eval.suite:
        for name, (benchmark, _) in named_sets(config.eval.suite).items():
            _benchmark_file(config, benchmark, name)


def protocols(config: Config) -> dict[str, Protocol]:
    """The protocol of every set by its name, in the order in which they are evaluated."""
    # The first of several terms says what is correct.
    first: Any = (config.reward.terms or [{"name": config.reward.name, "params": config.reward.params}])[0]
    own = Protocol(
        n=config.eval.n,
        k=tuple(config.eval.k),
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        top_k=config.eval.top_k,
        max_tokens=config.eval.max_tokens or config.rollout.max_tokens,
        template=config.data.template,
        reward=first["name"],
        reward_params=dict(first.get("params") or {}),
        problems=config.eval.problems,
    )
    found = {name: _changed(config, name, own) for name in set_names(eval_paths(config))}
    for name, (_, protocol) in named_sets(config.eval.suite).items():
        found[name] = _changed(config, name, protocol)
    return found or {config.data.name: _changed(config, config.data.name, own)}


def metric_names(name: str, protocol: Protocol) -> list[str]:
    """Metrics of the evaluation of a set, without intervals."""
    ks = [k for k in protocol.k if k > 1]
    labels = [f"avg@{protocol.n}", *(f"pass@{k}" for k in protocol.k), *(f"maj@{k}" for k in ks)]
    return [f"{name}/{label}" for label in labels]


def due_sets(config: Config, step: int) -> list[str]:
    """Names of the sets that are evaluated after ``step`` steps: all before the first and after the last one."""
    if step in (0, config.train.steps):
        return list(protocols(config))
    every = {name: config.eval.every if p.every is None else p.every for name, p in protocols(config).items()}
    return [name for name, steps in every.items() if steps and step % steps == 0]


def set_names(paths: Sequence[Path]) -> list[str]:
    """Names of the sets that files make: the file's name, with its directory's where that is not unique."""
    stems = [path.name.removesuffix(".gz").rsplit(".", 1)[0] or path.name for path in paths]
    return [
        stem if stems.count(stem) == 1 else f"{path.parent.name}-{stem}-{index}"
        for index, (stem, path) in enumerate(zip(stems, paths, strict=True))
    ]


def load_sets(config: Config, tokenizer: Any, heldout: Any, *, names: Sequence[str] | None = None) -> list[EvalSet]:
    """All sets, or those of ``names``. ``heldout(n)`` gives what training held out, where no set is configured.

    Problems whose prompt leaves no room for a response are dropped and counted. Raises ValueError for unreadable data.
    """
    sets = []
    files = {name: (path, "") for name, path in zip(set_names(eval_paths(config)), eval_paths(config), strict=True)}
    for name, (benchmark, _) in named_sets(config.eval.suite).items():
        files[name] = (_benchmark_file(config, benchmark, name), benchmark)
    for name, protocol in protocols(config).items():
        if names is not None and name not in names:
            continue
        if name not in files:
            problems = heldout(protocol.problems)
            sets.append(EvalSet(name, protocol, problems, len(problems), Counter(), "generated or held out"))
            continue
        path, benchmark = files[name]
        dropped: Counter[str] = Counter()
        rows = read_problems(path, dropped, EVAL_SPLITS)
        made = EvalSet(name, protocol, rows, len(rows) + sum(dropped.values()), dropped, path.name)
        if benchmark and made.total != BENCHMARKS[benchmark].problems:
            made.note = f"{path.name} has {made.total} problems; {BENCHMARKS[benchmark].title} is published with "
            made.note += str(BENCHMARKS[benchmark].problems)
        _fit(made, tokenizer, config)
        made.problems = made.problems[: protocol.problems]
        sets.append(made)
    return sets


def _fit(made: EvalSet, tokenizer: Any, config: Config) -> None:
    """Drop prompts that are longer than the context allows."""
    limit = config.rollout.max_model_len - 1
    fits = [
        problem for problem in made.problems if len(encode_prompt(tokenizer, problem, made.protocol.template)) <= limit
    ]
    if len(fits) < len(made.problems):
        made.dropped["prompt too long"] += len(made.problems) - len(fits)
        made.problems = fits
    if not fits:
        raise ValueError(
            f"no problem of {made.origin} fits: rollout.max_model_len={limit + 1} is shorter than every prompt"
        )


def _benchmark_file(config: Config, benchmark: str, name: str) -> Path:
    known = BENCHMARKS[benchmark]
    if config.eval.data_dir is None:
        raise ValueError(
            f"eval.suite needs the files of its benchmarks: set eval.data_dir=DIR, with {known.files[0]}.jsonl for "
            f"{name} (a public copy: {known.origin})"
        )
    directory = Path(config.eval.data_dir)
    if not directory.is_dir():
        raise ValueError(f"eval.data_dir={directory} is not a directory; name the one that has the benchmarks' files")
    present = {path.name.casefold(): path for path in directory.iterdir()}
    for stem in known.files:
        for extension in _EXTENSIONS:
            if path := present.get(stem + extension):
                return path
    raise ValueError(
        f"eval.data_dir={directory} has no file for {known.title} ({name}): expected {known.files[0]}.jsonl or "
        f".parquet; a public copy is {known.origin}"
    )


def _changed(config: Config, name: str, protocol: Protocol) -> Protocol:
    """A protocol with the settings of ``eval.sets`` for all sets and for this one."""
    for label in ("all", name):
        changes = config.eval.sets.get(label, {})
        if not isinstance(changes, Mapping):
            raise ValueError(f"eval.sets.{label}={changes} must be a mapping such as {{n: 4, every: 100}}")
        known = [f.name for f in fields(Protocol)]
        for key in changes:
            if key not in known:
                raise ValueError(f"eval.sets.{label}.{key} is unknown: a set's protocol has {', '.join(known)}")
        values = dict(changes)
        if "k" in values:
            values["k"] = tuple(values["k"]) if isinstance(values["k"], (list, tuple)) else (values["k"],)
        elif isinstance(values.get("n"), int):
            values["k"] = tuple(sorted({1, values["n"]}))
        protocol = replace(protocol, **values)
        _check_protocol(f"eval.sets.{label}" if changes else "eval", protocol)
    return protocol


def _check_protocol(where: str, p: Protocol) -> None:
    for key, low in _INTEGERS.items():
        value = getattr(p, key)
        optional = key in ("problems", "every")
        if value is None and optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{where}.{key}={value} must be a whole number of at least {low}")
    if not isinstance(p.temperature, (int, float)) or not 0 <= p.temperature < float("inf"):
        raise ValueError(f"{where}.temperature={p.temperature} must be a number of at least 0")
    if not isinstance(p.top_p, (int, float)) or not 0 < p.top_p <= 1:
        raise ValueError(f"{where}.top_p={p.top_p} must be a share above 0 and at most 1")
    if bad := [k for k in p.k if not isinstance(k, int) or not 1 <= k <= p.n]:
        raise ValueError(f"{where}.k={list(p.k)}: pass@{bad[0]} needs {where}.n >= {bad[0]}, not {p.n}")
    if p.temperature == 0 and p.n > 1:
        raise ValueError(f"{where}.temperature=0 with n={p.n}: greedy responses are all the same; set n to 1")
