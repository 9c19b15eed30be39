"""Work spread over threads that stops at the first error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")


def share(items: Sequence[Item], sizes: Sequence[int], count: int) -> list[list[Item]]:
    """Divide items into `count` lists of about the same total size, in order: neighbours are worked on together."""
    shares: list[list[Item]] = [[] for _ in range(count)]
    totals = [0] * count
    for item, size in zip(items, sizes, strict=True):
        smallest = totals.index(min(totals))
        shares[smallest].append(item)
        totals[smallest] += size
    return shares


def for_each(
    function: Callable[[Item], object], items: Iterable[Item], threads: int, stop: threading.Event | None = None
) -> None:
    """Call `function` on every item. The first error of any thread, or a signal in this one, drops what has not begun.

    Raises whatever `function` raises. `stop` is then set, for what has begun.
    """
    with ThreadPoolExecutor(threads) as pool:
        try:
            futures = [pool.submit(function, item) for item in items]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            if stop is not None:
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
