"""Prepare training data: read, validate, filter, split and report. Deterministic and streaming.

Three passes: the first finds texts that occur with two answers, the second filters and writes, the third splits off the
held-out problems. In memory are a hash per problem, the benchmarks' n-grams and the pass rates.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_ext.rl.types import Problem
from recipes.data import files
from recipes.data.card import write_card
from recipes.data.filters import Contamination, pass_rates
from recipes.data.preparation import Outcome, PrepareConfig
from recipes.data.schemas import to_problem
from recipes.data.sources import encode_prompt, read_problems, text_key

SAY_EVERY_S = 5.0


def prepare(config: PrepareConfig, say: Callable[[str], None] = print) -> Outcome:
    """Make ``config.out``. Raises ValueError in one sentence; nothing is left behind then."""
    check(config)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        outcome = Outcome(sources={str(p): _digest(p) for given in config.path for p in _files(Path(given))})
        conflicts = _conflicts(config, say)
        kept = work / "kept.jsonl"
        chosen = _filtered(config, conflicts, kept, outcome, say)
        _split(kept, work, chosen, outcome)
        kept.unlink()
        write_card(work, config, outcome)
        if out.exists() and not any(out.iterdir()):
            out.rmdir()
        os.chmod(work, 0o777 & ~_umask())
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return outcome


def check(config: PrepareConfig) -> None:
    """Refuse settings that cannot work. Raises ValueError."""
    if not config.path:
        raise ValueError("path is missing: give a file or directory with problems, as path=FILE or path=[FILE,FILE]")
    if not config.out:
        raise ValueError("out is missing: give the directory to make, as out=DIR")
    for key in ("path", "against"):
        for path in getattr(config, key):
            if not Path(path).exists():
                raise ValueError(f"{key}={path}: no such file or directory")
    if Path(config.out).exists() and (not Path(config.out).is_dir() or any(Path(config.out).iterdir())):
        raise ValueError(f"out={config.out} exists and is not empty; choose another directory")
    if config.max_prompt_tokens is not None and (config.tokenizer is None or config.max_prompt_tokens < 1):
        raise ValueError(f"max_prompt_tokens={config.max_prompt_tokens} needs to be positive, and tokenizer=DIR")
    if config.rates is not None and not Path(config.rates).exists():
        raise ValueError(f"rates={config.rates}: no such file")
    if config.rates is None and (config.min_rate, config.max_rate) != (0.0, 1.0):
        raise ValueError("min_rate and max_rate have no effect without rates=FILE")
    if not 0 <= config.min_rate < config.max_rate <= 1:
        raise ValueError(
            f"min_rate={config.min_rate}, max_rate={config.max_rate} must be shares, the first the smaller"
        )
    for key, low in (("ngram", 1), ("overlap", 1), ("heldout", 0)):
        if getattr(config, key) < low:
            raise ValueError(f"{key}={getattr(config, key)} must be at least {low}")
    for key, allowed in (("unrated", ("drop", "keep")), ("bad", ("stop", "drop"))):
        if getattr(config, key) not in allowed:
            raise ValueError(f"{key}={getattr(config, key)} must be {' or '.join(allowed)}")


# ------------------------------------------------------------------------------------------------------------ passes


def _rows(config: PrepareConfig) -> Iterator[tuple[str, Any, str]]:
    for given in config.path:
        path = Path(given)
        for where, row in files.rows(path):
            yield where, row, f"{path.name.split('.')[0]}-{where.rpartition(' ')[2]}"


def _key(problem: Problem) -> bytes:
    return hashlib.sha256(text_key(problem).encode()).digest()[:16]


def _conflicts(config: PrepareConfig, say: Callable[[str], None]) -> set[bytes]:
    """Texts that occur with two different answers, so that the right one is unknown."""
    answers: dict[bytes, int] = {}
    conflicts: set[bytes] = set()
    clock = _Clock(say, "reading")
    for where, row, identity in _rows(config):
        clock.tick()
        try:
            problem = to_problem(row, where=where, default_id=identity)
        except ValueError:
            if config.bad == "stop":
                raise
            continue
        key, answer = _key(problem), hash(problem.answer)
        if answers.setdefault(key, answer) != answer:
            conflicts.add(key)
    return conflicts


def _filtered(
    config: PrepareConfig, conflicts: set[bytes], kept: Path, outcome: Outcome, say: Callable[[str], None]
) -> set[bytes]:
    """Write what passes all filters; the keys of the held-out problems."""
    reasons = _Reasons(config, conflicts)
    smallest: list[tuple[int, bytes]] = []  # of the hashes that decide on the split, the largest first
    clock = _Clock(say, "filtering")
    identities: set[str] = set()
    with kept.open("w", encoding="utf-8") as file:
        for where, row, default_id in _rows(config):
            clock.tick()
            outcome.read += 1
            try:
                problem = to_problem(row, where=where, default_id=default_id)
            except ValueError as error:
                outcome.drop("not a problem", str(error))
                continue
            key = _key(problem)
            reason = reasons.of(problem, key, outcome)
            if reason is not None:
                outcome.drop(reason, where)
                continue
            identity = problem.id if problem.id not in identities else default_id
            identities.add(identity)
            outcome.answers[_kind(problem.answer)] += 1
            record = {
                "id": identity,
                "problem": problem.prompt,
                "answer": problem.answer,
                "source": where.rpartition("/")[2],
            }
            file.write(json.dumps({**record, "_key": key.hex()}, ensure_ascii=False) + "\n")
            rank = int.from_bytes(hashlib.sha256(f"heldout/{config.seed}/".encode() + key).digest()[:8], "big")
            heapq.heappush(smallest, (-rank, key))
            if len(smallest) > config.heldout:
                heapq.heappop(smallest)
    return {key for _, key in smallest}


def _split(kept: Path, work: Path, chosen: set[bytes], outcome: Outcome) -> None:
    heldout = (work / "heldout.jsonl").open("w", encoding="utf-8") if chosen else None
    with kept.open(encoding="utf-8") as rows, (work / "train.jsonl").open("w", encoding="utf-8") as train:
        for line in rows:
            row = json.loads(line)
            target = heldout if bytes.fromhex(row.pop("_key")) in chosen else train
            assert target is not None
            target.write(json.dumps(row, ensure_ascii=False) + "\n")
            outcome.heldout += target is heldout
            outcome.train += target is train
    if heldout is not None:
        heldout.close()
    if not outcome.train:
        raise ValueError(f"no training problem is left of {outcome.read} rows, dropped {dict(outcome.dropped)}")


class _Reasons:
    """Why a problem is dropped; the first reason that applies."""

    def __init__(self, config: PrepareConfig, conflicts: set[bytes]) -> None:
        self._config, self._conflicts = config, conflicts
        self._seen: set[bytes] = set()
        self._tokenizer: Any = None
        if config.tokenizer is not None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
        benchmarks = [file for given in config.against for file in _benchmarks(Path(given))]
        texts = (
            (path.name.split(".")[0], problem.prompt)
            for path in benchmarks
            for problem in read_problems(path, Counter(), files.EVAL_SPLITS)
        )
        self._contamination = Contamination(texts, config.ngram) if benchmarks else None
        self._rates = pass_rates(Path(config.rates)) if config.rates is not None else None

    def of(self, problem: Problem, key: bytes, outcome: Outcome) -> str | None:
        config = self._config
        if key in self._conflicts:
            return "same text with different answers"
        if key in self._seen:
            return "repeated problem"
        self._seen.add(key)
        if self._contamination is not None:
            name = self._contamination.source(problem.prompt, config.overlap)
            if name is not None:
                return f"shares {config.ngram} words with {name}"
        if self._rates is not None:
            rate = self._rates.get(problem.id)
            if rate is None and config.unrated == "drop":
                return "no pass rate"
            if rate is not None and not config.min_rate < rate[0] < config.max_rate:
                return f"pass rate not between {config.min_rate:g} and {config.max_rate:g}"
        if self._tokenizer is not None:
            tokens = len(encode_prompt(self._tokenizer, problem, config.template))
            if config.max_prompt_tokens is not None and tokens > config.max_prompt_tokens:
                return f"prompt longer than {config.max_prompt_tokens} tokens"
            outcome.tokens.append(tokens)
        return None


class _Clock:
    """Prints the number of rows read from time to time."""

    def __init__(self, say: Callable[[str], None], what: str) -> None:
        self._say, self._what, self._rows = say, what, 0
        self._begun = self._said = time.monotonic()

    def tick(self) -> None:
        self._rows += 1
        if self._rows % 256 == 0 and (now := time.monotonic()) - self._said > SAY_EVERY_S:
            self._said = now
            self._say(f"{self._what}: {self._rows} rows, {self._rows / (now - self._begun):.0f} rows/s")


def _files(path: Path) -> list[Path]:
    return files.directory_files(path, files.TRAIN_SPLITS) if path.is_dir() else [path]


def _benchmarks(path: Path) -> list[Path]:
    """A folder of benchmarks has a file for each."""
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.name.endswith((*files.TABLES, *files.JSON_LINES)))
    return found or [path]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kind(answer: str) -> str:
    bare = answer.replace(",", "").replace("$", "").strip()
    if bare.lstrip("+-").isdigit():
        return "integer"
    return "decimal" if bare.lstrip("+-").replace(".", "", 1).isdigit() else "expression or text"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
