"""Run the missing part of a study in one or more processes, and report progress and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from recipes.studies import results
from recipes.studies.definitions import Study
from recipes.studies.engine import PASS_K, Method, Setting, train


@dataclass(frozen=True)
class Item:
    """The unit of work: one method in one setting for some seeds. Its results are written all at once."""

    study: str
    label: str
    setting: Setting
    name: str
    method: Method
    seeds: tuple[int, ...]
    probe: str

    @property
    def cost(self) -> float:
        """Relative cost, used only to estimate the time left."""
        s = self.setting
        per_update = 1.0 if s.level == "L1" else 8.0
        return s.steps * s.epochs * s.mini_batches * len(self.seeds) * per_update * (3.0 if self.probe else 1.0)


def missing(
    name: str,
    study: Study,
    rows: list[results.Row],
    seeds: int | None = None,
    level: str | None = None,
    only: str | None = None,
    methods: Collection[str] | None = None,
) -> Iterator[Item]:
    """Yield the work that ``rows`` lack. ``seeds``, ``level``, ``only`` (setting) and ``methods`` narrow the study."""
    done: dict[tuple[str, str, str], set[int]] = {}
    for row in rows:
        done.setdefault((row["setting"], row["method"], row["digest"]), set()).add(row["seed"])
    for label, setting in study.settings.items():
        if (level and setting.level != level) or (only and label != only):
            continue
        wanted = range(study.seeds_of(label) if seeds is None else seeds)
        for method_name, method in study.of(label).items():
            if methods and method_name not in methods:
                continue
            have = done.get((label, method_name, results.digest(setting, method)), set())
            if lacking := tuple(seed for seed in wanted if seed not in have):
                yield Item(name, label, setting, method_name, method, lacking, study.probe)


def _run(item: Item) -> tuple[list[results.Row], results.Row]:
    seeds = list(item.seeds)
    curves = train(item.setting, item.method, seeds, probe=item.probe)
    rows = results.rows_of(item.study, item.label, item.setting, item.name, item.method, seeds, curves)
    return rows, results.curves_of(item.label, item.setting, item.name, item.method, seeds, curves)


def _finished(items: list[Item], jobs: int) -> Iterator[tuple[Item, list[results.Row], results.Row]]:
    """Run the items in ``jobs`` processes and yield each when it finishes."""
    if jobs <= 1:
        yield from ((item, *_run(item)) for item in items)
        return
    # One thread each: the tensors are small.
    start = partial(torch.set_num_threads, 1)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=start) as pool:
        futures = {pool.submit(_run, item): item for item in items}
        yield from ((futures[future], *future.result()) for future in as_completed(futures))


def run(
    name: str,
    study: Study,
    *,
    root: Path = results.ROOT,
    jobs: int = 1,
    seeds: int | None = None,
    level: str | None = None,
    only: str | None = None,
    methods: Collection[str] | None = None,
    report: Callable[[str], None] = print,
) -> list[results.Row]:
    """Complete the study's results file and return all its rows. It can be stopped and restarted at any time."""
    path = root / f"{name}.jsonl"
    items = list(missing(name, study, results.read(path), seeds, level, only, methods))
    if not items:
        return results.read(path)
    begin, done, total = time.monotonic(), 0.0, sum(item.cost for item in items)
    runs = sum(len(item.seeds) for item in items)
    report(f"{name}: {len(items)} method x setting, {runs} runs, {jobs} process{'es' if jobs > 1 else ''}")
    for count, (item, rows, curves) in enumerate(_finished(items, jobs), 1):
        if study.curves:
            results.append(root / "curves" / f"{name}.jsonl", [curves])
        results.append(path, rows)
        done += item.cost
        elapsed = time.monotonic() - begin
        left = elapsed * (total - done) / done
        mean = sum(row["avg_at_k"] or 0.0 for row in rows) / len(rows)
        entropy = sum(row["final_entropy"] or 0.0 for row in rows) / len(rows)
        report(
            f"[{count}/{len(items)}] {item.label}, {item.name}: avg@{PASS_K} {mean:.3f}, entropy "
            f"{entropy:.3f} ({len(rows)} seeds); {elapsed:.0f} s, about {left:.0f} s left"
        )
    return results.read(path)
