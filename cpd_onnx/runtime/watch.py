"""Ends runs of onnxruntime that take too long."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

import onnxruntime as ort

_INTERVAL, _LONGEST = 0.5, 1.0
"""Seconds between two looks at what runs, and most that count (heuristic): a process that is stopped, by
Ctrl-Z or because the machine sleeps, does not run meanwhile."""

_running: dict[int, tuple[float, ort.RunOptions]] = {}
"""How many seconds each run may take, and its options."""
_numbers = itertools.count()
_watcher: threading.Thread | None = None


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[ort.RunOptions]:
    """Yield options for one run of a session, which is ended with an error soon after that many seconds.

    One thread watches all runs. A timer for each, which is a thread of its own, would take longer to start than many
    runs take: all other threads have to let go of Python's lock first.
    """
    number, limits = next(_numbers), ort.RunOptions()
    _running[number] = (seconds, limits)
    _start()
    try:
        yield limits
    finally:
        del _running[number]


def _start() -> None:
    """Start the thread, unless it runs: in a forked process it does not. A second one would do no harm."""
    global _watcher  # there is one for the process
    if _watcher is None or not _watcher.is_alive():
        _watcher = threading.Thread(target=_watch, daemon=True)
        _watcher.start()


def _watch() -> None:
    left, looked = dict[int, float](), time.monotonic()
    while True:
        time.sleep(_INTERVAL)
        before, looked = looked, time.monotonic()
        passed = min(looked - before, _LONGEST)
        running = _running.copy()
        left = {number: left[number] - passed if number in left else limit for number, (limit, _) in running.items()}
        for number, seconds in left.items():
            if seconds < 0:
                running[number][1].terminate = True
