"""User-defined reward functions: ``reward.name=package.module:function``.

The function gets what it names among `ARGUMENTS`, plus ``reward.params``. It returns a score, or True / False, or
``(score, correct)``, or a mapping with ``score`` and ``acc`` (verl's). A score above 0 counts as correct where nothing
else is said. The module is imported inside the sandbox, never in the trainer: it cannot write, start programs or
connect.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from recipes.rewards.types import MAX_ANSWER_CHARS, OK, RewardItem, RewardResult

NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
ARGUMENTS: dict[str, Callable[[RewardItem], Any]] = {
    "text": lambda item: item.text,
    "gold": lambda item: item.gold,
    "truncated": lambda item: item.truncated,
    # verl's names
    "solution_str": lambda item: item.text,
    "ground_truth": lambda item: item.gold,
    "data_source": lambda item: "",
    "extra_info": lambda item: {},
}


@dataclass
class Custom:
    """A user's function as a verifier. `load` imports it; a call before that does, too."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    _function: Callable[..., Any] | None = None
    _takes: tuple[str, ...] = ()
    in_process: ClassVar[bool] = False

    def load(self) -> None:
        """Import the function. Raises ValueError saying what is wrong with it."""
        module, _, attribute = self.name.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"reward.name={self.name}: {error}; start where it can be imported, or set PYTHONPATH"
            ) from error
        except AttributeError as error:
            raise ValueError(f"reward.name={self.name}: {error}") from error
        if not callable(function):
            raise ValueError(f"reward.name={self.name} is a {type(function).__name__}, not a function")
        parameters = inspect.signature(function).parameters
        self._takes = tuple(name for name in parameters if name in ARGUMENTS and name not in self.params)
        required = {
            name
            for name, p in parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        if unknown := required - set(ARGUMENTS) - set(self.params):
            raise ValueError(
                f"reward.name={self.name} needs the argument {min(unknown)}: set reward.params.{min(unknown)}, or name "
                f"it one of {', '.join(ARGUMENTS)}"
            )
        if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()) and (
            odd := set(self.params) - set(parameters)
        ):
            raise ValueError(f"reward.params.{min(odd)}: {self.name} has no such argument")
        self._function = function

    def __call__(self, item: RewardItem) -> RewardResult:
        if self._function is None:
            self.load()
        assert self._function is not None
        return as_result(self._function(**{name: ARGUMENTS[name](item) for name in self._takes}, **self.params))


def as_result(value: Any) -> RewardResult:
    """The score that a user's function returned. Raises TypeError for anything else."""
    answer = correct = None
    if isinstance(value, Mapping):
        answer, correct = value.get("answer", value.get("pred")), value.get("correct", value.get("acc"))
        value = value["score"]
    elif isinstance(value, tuple) and len(value) == 2:
        value, correct = value
    if isinstance(value, RewardResult):
        return value
    if not isinstance(value, (int, float)):
        value = value.item()  # a number of numpy or torch
    read = answer[:MAX_ANSWER_CHARS] if isinstance(answer, str) else None
    return RewardResult(float(value), bool(value > 0 if correct is None else correct), OK, read)
