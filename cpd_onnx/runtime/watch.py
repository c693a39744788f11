"""Ends runs of onnxruntime that take too long."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import onnxruntime as ort

_INTERVAL = 0.5
"""Seconds between two looks at what runs (heuristic)."""

_running: dict[int, tuple[float, ort.RunOptions]] = {}
"""When each run has to end, by the clock `time.monotonic`, and its options."""
_watcher: threading.Thread | None = None


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[ort.RunOptions]:
    """Yield options for one run of a session, which is ended with an error soon after that many seconds.

    One thread watches all runs. A timer for each, which is a thread of its own, would take longer to start than many
    runs take: all other threads have to let go of Python's lock first.
    """
    limits = ort.RunOptions()
    _running[id(limits)] = (time.monotonic() + seconds, limits)
    _start()
    try:
        yield limits
    finally:
        del _running[id(limits)]


def _start() -> None:
    """Start the thread, unless it runs: in a forked process it does not. A second one would do no harm."""
    global _watcher  # there is one for the process
    if _watcher is None or not _watcher.is_alive():
        _watcher = threading.Thread(target=_watch, daemon=True)
        _watcher.start()


def _watch() -> None:
    while True:
        time.sleep(_INTERVAL)
        now = time.monotonic()
        for end, limits in list(_running.values()):
            if now > end:
                limits.terminate = True
