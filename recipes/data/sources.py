"""Sources of problems, and their order in training.

The order is a pure function of ``(seed, position)``: position 0, 1, 2, ... is the first, second, third training
problem of the run, every problem comes exactly once per epoch, and a run resumes from its position alone.
"""

from __future__ import annotations

import importlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from megatron_ext.rl.types import Problem
from recipes.data import files, tasks
from recipes.data.files import EVAL_SPLITS, TRAIN_SPLITS
from recipes.data.schemas import to_problem

GENERATORS: dict[str, Callable[..., Problem]] = {
    "chain": tasks.chain_problem,
    "word_problems": tasks.word_problem,
    "one_step_problems": tasks.one_step_problem,
}
_GENERATED_HELDOUT_SEED = 0  # one held-out set for all runs, so that their evaluations compare
_CHAT = "chat"


class ProblemSource(Protocol):
    """Training problems in a resumable order, and held-out ones that never occur among them."""

    train_size: int | None  # problems per epoch; None: endless
    dropped: Counter[str]  # problems left out at loading, by reason

    def problems(self, position: int, count: int) -> list[Problem]:
        """Training problems ``position`` to ``position + count - 1`` of the run."""
        ...

    def batch(self, step: int, size: int) -> list[Problem]:
        """Problems of one step when every step takes ``size``."""
        ...

    def heldout(self, n: int) -> list[Problem]:
        """The first ``n`` held-out problems, or all if there are fewer; the same for every seed."""
        ...


def make_source(
    name: str,
    *,
    path: str | Path | None = None,
    eval_path: str | Path | Sequence[str | Path] | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    template: str = "{problem}",
    max_prompt_tokens: int | None = None,
) -> ProblemSource:
    """Build the problem source of a run.

    Args:
        name: ``chain`` or ``word_problems`` (generated), ``jsonl`` or ``gsm8k`` (both need ``path``), or a data set
            of the Hugging Face hub as ``owner/name``, which needs the ``datasets`` package.
        path: a file or directory of `recipes.data.files`; takes the place of generated problems.
        eval_path: held-out problems, a file or several. None: a sixteenth of the texts of ``path``, by hash.
        seed: order of training problems; the split does not depend on it.
        tokenizer, template, max_prompt_tokens: with a limit, longer prompts are dropped and counted.

    Raises ``ValueError`` with file, line and fix for everything that is wrong with the data.
    """
    fits = _length_filter(tokenizer, template, max_prompt_tokens)
    if path is None and name in GENERATORS:
        if eval_path is not None:
            raise ValueError(f"data.eval_path needs data.path: data.name={name} generates its own held-out problems")
        return GeneratedSource(GENERATORS[name], seed=seed, fits=fits)
    dropped: Counter[str] = Counter()
    if path is not None:
        rows = read_problems(path, dropped)
    elif "/" in name:
        rows = _hub_problems(name, dropped)
    elif name in ("jsonl", "gsm8k"):
        raise ValueError(f"data.name={name} needs a file: set data.path=<file.jsonl> with problem and answer per line")
    else:
        raise ValueError(
            f"data.name={name!r} is unknown: use {', '.join(GENERATORS)}, jsonl or gsm8k with data.path, or owner/name"
        )
    heldout = None
    if eval_path is not None:
        paths = [eval_path] if isinstance(eval_path, (str, Path)) else eval_path
        heldout = [problem for file in paths for problem in read_problems(file, dropped, EVAL_SPLITS)]
    source = FileSource(rows, heldout, seed=seed, fits=fits, label=str(path or name))
    source.dropped.update(dropped)
    return source


# ---------------------------------------------------------------------------------------------------------- sources


class GeneratedSource:
    """Endless problems of a generated task; the task's own split keeps held-out texts out of training."""

    def __init__(self, generate: Callable[..., Problem], *, seed: int, fits: Callable[[Problem], bool]) -> None:
        self._generate = generate
        self._seed = seed
        self.train_size: int | None = None
        self.dropped: Counter[str] = Counter()
        if not fits(generate(seed, 0)):
            raise ValueError("data.max_prompt_tokens is too small for the generated task: its prompts do not fit")

    def problems(self, position: int, count: int) -> list[Problem]:
        return [self._generate(self._seed, position + offset) for offset in range(count)]

    def batch(self, step: int, size: int) -> list[Problem]:
        return self.problems(step * size, size)

    def heldout(self, n: int) -> list[Problem]:
        found: dict[str, Problem] = {}
        for index in range(20 * n):  # a text may be drawn twice
            problem = self._generate(_GENERATED_HELDOUT_SEED, index, split="heldout")
            found.setdefault(text_key(problem), problem)
            if len(found) == n:
                break
        return list(found.values())


class FileSource:
    """Problems from a file: each exactly once per epoch, every epoch in a different order."""

    def __init__(
        self,
        rows: Sequence[Problem],
        heldout: Sequence[Problem] | None,
        *,
        seed: int,
        fits: Callable[[Problem], bool],
        label: str,
    ) -> None:
        self.dropped: Counter[str] = Counter()
        if heldout is None:
            train = [row for row in rows if tasks.split_of(text_key(row)) == "train"]
            heldout = [row for row in rows if tasks.split_of(text_key(row)) == "heldout"]
        else:
            evaluated = {text_key(row) for row in heldout}
            train = [row for row in rows if text_key(row) not in evaluated]
            self._count("training problem that is also held out", len(rows) - len(train))
        self._train = [row for row in train if fits(row)]
        self._heldout = [row for row in heldout if fits(row)]
        self._count("prompt too long", len(train) + len(heldout) - len(self._train) - len(self._heldout))
        if not self._train:
            raise ValueError(f"{label} has no training problem left, dropped {dict(self.dropped)}: use a larger file")
        self.train_size: int | None = len(self._train)
        self._label = label
        self._order = lru_cache(maxsize=2)(lambda epoch: _shuffled(len(self._train), f"{seed}/epoch/{epoch}"))

    def problems(self, position: int, count: int) -> list[Problem]:
        chosen = []
        for at in range(position, position + count):
            epoch, index = divmod(at, len(self._train))
            chosen.append(self._train[self._order(epoch)[index]])
        return chosen

    def batch(self, step: int, size: int) -> list[Problem]:
        return self.problems(step * size, size)

    def heldout(self, n: int) -> list[Problem]:
        if n > 0 and not self._heldout:
            raise ValueError(f"{self._label} is too small to split off held-out problems: set data.eval_path")
        return self._heldout[:n]

    def _count(self, reason: str, number: int) -> None:
        if number:
            self.dropped[reason] += number


def _shuffled(n: int, key: str) -> list[int]:
    order = list(range(n))
    random.Random(key).shuffle(order)
    return order


def text_key(problem: Problem) -> str:
    """Key of a problem: two problems are the same if their texts agree up to case and spacing."""
    return " ".join(problem.prompt.casefold().split())


# ---------------------------------------------------------------------------------------------------------- reading


def read_problems(
    path: str | Path, dropped: Counter[str] | None = None, splits: Sequence[str] = TRAIN_SPLITS
) -> list[Problem]:
    """Problems of a file or directory, in any format of `recipes.data.files` and `recipes.data.schemas`.

    Equal repetitions are kept once and counted in ``dropped``. Raises ``ValueError`` naming file, line and fix for bad
    lines, repeated ids and problems with two different answers.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"data file {path} does not exist: check data.path and data.eval_path")
    return _distinct(files.rows(path, splits), path.name.split(".")[0], str(path), dropped)


def _distinct(rows: Iterable[tuple[str, Any]], stem: str, label: str, dropped: Counter[str] | None) -> list[Problem]:
    first_by_text: dict[str, tuple[str, Problem]] = {}
    where_by_id: dict[str, str] = {}
    for where, row in rows:
        number = where.rpartition(" ")[2]
        problem = to_problem(row, where=where, default_id=f"{stem}-{number}")
        earlier, same = first_by_text.setdefault(text_key(problem), (where, problem))
        place = earlier.rpartition(", ")[2]
        if same.answer != problem.answer:
            raise ValueError(f"{where}: {place} has this problem with another answer; remove one")
        if earlier != where:
            if dropped is not None:
                dropped["repeated problem"] += 1
            continue
        if where_by_id.setdefault(problem.id, where) != where:
            taken = where_by_id[problem.id].rpartition(", ")[2]
            raise ValueError(f"{where}: id {problem.id!r} is taken by {taken}")
    if not first_by_text:
        raise ValueError(f"{label} has no problems: write one JSON object with problem and answer per line")
    return [problem for _, problem in first_by_text.values()]


def _hub_problems(name: str, dropped: Counter[str]) -> list[Problem]:
    try:
        datasets = importlib.import_module("datasets")  # optional, hence not among our requirements
    except ImportError as error:
        raise ValueError(
            f"data.name={name} is on the Hugging Face hub and needs the datasets package: "
            "pip install datasets, or give a local copy as data.path"
        ) from error
    rows: Iterable[Any] = datasets.load_dataset(name, split="train")
    return _distinct(((f"{name}, row {i}", row) for i, row in enumerate(rows)), name, name, dropped)


# --------------------------------------------------------------------------------------------------------- encoding


def check_template(tokenizer: Any, template: str) -> None:
    """Raises ``ValueError`` when the template cannot hold a problem or asks for a chat template that is not there."""
    if template == _CHAT or template.startswith(f"{_CHAT}:"):
        if not tokenizer.chat_template:
            raise ValueError("data.template=chat, but the tokenizer has no chat template: use '{problem}' with text")
        template = template.removeprefix(_CHAT).removeprefix(":") or "{problem}"
    if template.count("{problem}") != 1:
        raise ValueError(f"data.template must contain {{problem}} exactly once, not as in {template!r}")


def encode_prompt(tokenizer: Any, problem: Problem, template: str = "{problem}") -> list[int]:
    r"""Token ids of a prompt, special tokens included.

    ``template`` is text with ``{problem}`` in it (nothing else is replaced, so LaTeX braces are safe), or ``chat`` for
    the tokenizer's chat template with the problem as the user's message, or ``chat:`` followed by the text of that
    message, such as ``chat:{problem}\nPut the answer within \boxed{}.``

    Raises ``ValueError`` when the tokenizer does not know a word of the problem.
    """
    check_template(tokenizer, template)
    ids = render_prompt(tokenizer, problem.prompt, template)
    unknown = tokenizer.unk_token_id
    ambiguous = unknown in (None, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if not ambiguous and unknown in ids and tokenizer.unk_token not in problem.prompt:
        raise ValueError(f"the tokenizer does not know every word of problem {problem.id}: data and model do not match")
    return ids


def render_prompt(tokenizer: Any, problem: str, template: str) -> list[int]:
    """Token ids of a problem in a template that was checked, see `encode_prompt`."""
    if template == _CHAT or template.startswith(f"{_CHAT}:"):
        content = template.removeprefix(_CHAT).removeprefix(":") or "{problem}"
        messages = [{"role": "user", "content": content.replace("{problem}", problem)}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(template.replace("{problem}", problem))["input_ids"])


def _length_filter(tokenizer: Any, template: str, max_prompt_tokens: int | None) -> Callable[[Problem], bool]:
    if tokenizer is None or max_prompt_tokens is None:
        return lambda problem: True
    if max_prompt_tokens < 1:
        raise ValueError(f"data.max_prompt_tokens must be positive, not {max_prompt_tokens}")
    return lambda problem: len(encode_prompt(tokenizer, problem, template)) <= max_prompt_tokens
