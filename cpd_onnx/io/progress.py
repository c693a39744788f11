"""Progress of long work: which step runs, how far it is, and how long it will take.

As with logging, a step does not know who listens: `reporting` sets the observer for everything called in its block, and
without one a report costs a look-up. So functions at any depth report without an argument for it.

>>> with reporting(print):
...     announce("comb", "score")
...     with step("score"):
...         for _ in tracked("ab"):
...             pass
2/2 score
2/2 score  0 %
2/2 score  100 %
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

T = TypeVar("T")

_INTERVAL = 0.1
"""Seconds between two reports of a step, so that short parts of the work are not slowed down; a heuristic."""


@dataclass(frozen=True)
class ProgressEvent:
    """A report of progress.

    Attributes:
        number: Number of the step, from 1; 0 before the first of the announced steps.
        steps: Number of announced steps; 0 if they are not known.
        name: Name of the step, such as "score"; "iterate: score" for a step inside another.
        done: Number of finished parts of the step.
        total: Number of its parts; None if it is not known.
        seconds: Seconds since the step began.
        seconds_left: Estimate of the seconds until the end of the step, not of the run; None if there is none.
        detail: Further words, such as the loss of a training; empty for none.
    """

    number: int
    steps: int
    name: str
    done: int = 0
    total: int | None = None
    seconds: float = 0.0
    seconds_left: float | None = None
    detail: str = ""

    @property
    def title(self) -> str:
        """Number and name of the step, such as "2/6 score"."""
        return f"{self.number}/{self.steps} {self.name}" if self.number else self.name

    @property
    def rest(self) -> str:
        """How far the step is, such as "40 %  0:12 left"; empty if that is not known."""
        words = [f"{100 * min(1, self.done / self.total):.0f} %"] if self.total else []
        if self.seconds_left:
            minutes, seconds = divmod(round(self.seconds_left), 60)
            words.append(f"{minutes}:{seconds:02d} left")
        return "  ".join([*words, self.detail] if self.detail else words)

    def __str__(self) -> str:
        """Return the event as a line, such as "2/6 score  40 %  0:12 left"."""
        return f"{self.title}  {self.rest}" if self.rest else self.title


ProgressObserver: TypeAlias = Callable[[ProgressEvent], None]
"""Called at the start of a step, at most ten times a second during it, and when all its parts are done."""


class Notify(Protocol):
    """What a workflow reports to: the name of a step, its finished parts and their number."""

    def __call__(self, name: str, done: int = 0, total: int | None = None, detail: str = "", /) -> None:
        """Report the progress of a step."""


def ignore(name: str, done: int = 0, total: int | None = None, detail: str = "", /) -> None:
    """Discard every report of progress."""


class Tracker:
    """Makes events of reports: it counts the steps and estimates the time left."""

    def __init__(self, observer: ProgressObserver, clock: Callable[[], float] = time.perf_counter) -> None:
        """Report to an observer; the clock gives seconds."""
        self._observer, self._clock = observer, clock
        self._names: tuple[str, ...] = ()
        self._number, self._name = 0, ""
        self._began = self._reported = 0.0
        self._first: tuple[int, float] | None = None

    def announce(self, names: Sequence[str]) -> None:
        """Set the names of all steps in order, each as often as it runs; only the first call of a run counts."""
        self._names = self._names or tuple(names)

    def __call__(self, name: str, done: int = 0, total: int | None = None, detail: str = "", /) -> None:
        """Report the progress of a step; steps that were not announced count as parts of the one before them."""
        now = self._clock()
        if name != self._name:
            self._name, self._began, self._first = name, now, None
            self._number = self._place(name.partition(":")[0])
        elif done != total and self._first and now - self._reported < _INTERVAL:
            return
        self._reported, left = now, self._left(done, total, now)
        event = ProgressEvent(self._number, len(self._names), name, done, total, now - self._began, left, detail)
        self._observer(event)

    def _left(self, done: int, total: int | None, now: float) -> float | None:
        """Return the seconds until all parts are done, at the pace since the first report with a total."""
        if total is None:
            return None
        self._first = self._first or (done, now)
        start, began = self._first
        return (now - began) * max(0, total - done) / (done - start) if done > start else None

    def _place(self, name: str) -> int:
        """Return the number of the next announced step of a name; the present number if there is none."""
        start = max(0, self._number - 1)
        return self._names.index(name, start) + 1 if name in self._names[start:] else self._number


@dataclass(frozen=True)
class _Place:
    """Where the work is: the name of the open step, empty for none, and whether the steps inside it are hidden."""

    tracker: Tracker
    name: str = ""
    is_whole: bool = False


_place: ContextVar[_Place | None] = ContextVar("_place", default=None)


@contextlib.contextmanager
def reporting(observer: ProgressObserver | None) -> Iterator[Notify]:
    """Report the progress of the block to an observer; with None, to that of the surrounding block if there is one."""
    if observer is None:
        place = _place.get()
        yield ignore if place is None else place.tracker
        return
    tracker = Tracker(observer)
    with _at(_Place(tracker)):
        yield tracker


@contextlib.contextmanager
def _at(place: _Place | None) -> Iterator[None]:
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def announce(*names: str) -> None:
    """Announce the names of all steps of a run, in order."""
    place = _place.get()
    if place is not None and not place.name:
        place.tracker.announce(names)


@contextlib.contextmanager
def step(name: str, *, is_whole: bool = False) -> Iterator[None]:
    """Report the block, or a decorated function, as a step.

    A step inside another one is shown as "outer: inner"; a step of the same name is the same step. The steps inside a
    whole one, which counts its parts itself, are not shown.
    """
    place = _place.get()
    if place is None or place.is_whole:
        with _at(None):
            yield
        return
    parts = [part for part in place.name.split(": ") if part]
    full = ": ".join(parts if parts[-1:] == [name] else [*parts, name])
    if full != place.name:
        place.tracker(full)
    with _at(_Place(place.tracker, full, is_whole)):
        yield


def advance(done: int, total: int | None = None, detail: str = "") -> None:
    """Report how many parts of the open step are finished."""
    place = _place.get()
    if place is not None and place.name:
        place.tracker(place.name, done, total, detail)


def tracked(items: Sequence[T]) -> Iterator[T]:
    """Yield the parts of the open step, and report each finished one."""
    for done, item in enumerate(items):
        advance(done, len(items))
        yield item
    advance(len(items), len(items))
