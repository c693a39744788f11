"""Threads: how many run at the same time, and results of a function in order from several."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_MOST_THREADS = 8
"""Maximum number of batches that run at the same time, each of which takes memory (heuristic)."""


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function: Callable[[int], T], count: int) -> Iterator[T]:
    """Yield a function's results for 0, 1, … `count` - 1 in this order, computed on several threads."""
    threads = min(_MOST_THREADS, processors(), count)
    if threads < 2:
        yield from map(function, range(count))
        return
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for number in range(count):
            waiting.append(pool.submit(function, number))
            if len(waiting) > threads:  # so that no more results than these wait in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
