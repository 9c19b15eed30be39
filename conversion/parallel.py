"""Work spread over threads that stops at the first error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")


def for_each(function: Callable[[Item], object], items: Iterable[Item], threads: int) -> None:
    """Call `function` on every item. The first error of any thread, or a signal in this one, drops what has not begun.

    Raises whatever `function` raises.
    """
    with ThreadPoolExecutor(threads) as pool:
        try:
            futures = [pool.submit(function, item) for item in items]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
