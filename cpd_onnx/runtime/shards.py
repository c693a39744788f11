"""Batches divided among the processes of one run, and the exchange of what is computed from them.

All processes run the same program on the same model and samples. Each computes on its own batches, and receives what
the others computed on theirs, in the order of the batches. Sums over batches, and all that follows from them, thus have
the same bytes in every process as in a run of one process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from cpd_onnx.errors import CpdError
from cpd_onnx.runtime.threads import in_order

T = TypeVar("T")
R = TypeVar("R")

_PARTS = 8
"""Number of parts in which sums are exchanged, and so of processes that share a run evenly (heuristic)."""


_EXCHANGED_BYTES = 64 << 20
"""Approximate number of bytes of sums that are exchanged at once, when the first have told their size (heuristic)."""


class Group(Protocol):
    """The processes of a run, as seen from one of them."""

    @property
    def rank(self) -> int:
        """Rank of this process: 0 for the first, which measures times and writes files."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def exchanged(self, value: Any) -> list[Any]:
        """Return the values that all processes give, by rank."""


@dataclass(frozen=True)
class Alone:
    """The group of a single process."""

    rank: int = 0
    size: int = 1

    def exchanged(self, value: Any) -> list[Any]:
        """Return the value of this process."""
        return [value]


_ALONE: Group = Alone()
_group: ContextVar[Group] = ContextVar("group", default=_ALONE)


def current_group() -> Group:
    """Return the processes among which batches are divided; this one alone outside of `sharing`."""
    return _group.get()


@contextmanager
def sharing(group: Group) -> Iterator[None]:
    """Divide batches among the processes of a group."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def agreed(make: Callable[[], R]) -> R:
    """Return in all processes what the first one makes, such as a measured time."""
    group = current_group()
    found: R = _exchanged(group, ("agreed",), make() if group.rank == 0 else None)[0]
    return found


def _exchanged(group: Group, what: tuple[object, ...], value: Any) -> list[Any]:
    """Return the values that all processes give, by rank; raises CpdError if they do not all say the same of `what`."""
    whats, values = zip(*group.exchanged((what, value)), strict=True)
    if any(other != what for other in whats):
        raise CpdError("the processes do not compute the same: give all the same files, versions and kind of processor")
    return list(values)


@dataclass(frozen=True, eq=False)
class Divided(Generic[T]):
    """A sequence of which each process of a group holds some items.

    Attributes:
        items: The items; None in place of one that another process holds.
        parts: Number of the part of each, in ascending order: all items of a part are in one process.
        group: The processes.
    """

    items: Sequence[T | None]
    parts: Sequence[int]
    group: Group

    @classmethod
    def among(cls, items: Sequence[T], held_out: int = 0) -> Divided[T]:
        """Divide items that all processes know among those of the current group.

        The last `held_out` are divided as evenly as the others. The parts are the same for any number of processes.
        """
        counts = len(items) - held_out, held_out
        parts = [first * _PARTS + n * _PARTS // count for first, count in enumerate(counts) for n in range(count)]
        found = cls(items, parts, current_group())
        return replace(found, items=[item if found.is_own(n) else None for n, item in enumerate(items)])

    def __len__(self) -> int:
        """Return the number of items that all processes hold."""
        return len(self.items)

    def __getitem__(self, part: slice) -> Divided[T]:
        """Return some of the items, where they are."""
        return replace(self, items=self.items[part], parts=self.parts[part])

    def at(self, places: Sequence[int]) -> Divided[T]:
        """Return the items at some places, where they are."""
        return replace(self, items=[self.items[n] for n in places], parts=[self.parts[n] for n in places])

    def of(self, place: int) -> T:
        """Return an item that this process holds."""
        found: Any = self.items[place]
        item: T = found
        return item

    @property
    def own(self) -> list[T]:
        """The items that this process holds."""
        return [self.of(place) for place in range(len(self)) if self.is_own(place)]

    def is_own(self, place: int) -> bool:
        """Return whether this process holds an item."""
        return self._owner(self.parts[place]) == self.group.rank

    def map(self, function: Callable[[T], R]) -> Divided[R]:
        """Return the results of a function for each item, where the items are; it is called from several threads."""
        made = self._made(function)
        items = [next(made) if self.is_own(place) else None for place in range(len(self))]
        return Divided(items, self.parts, self.group)

    def each(self, function: Callable[[T], R]) -> list[R]:
        """Return the results of a function for all items in all processes, which must call this alike."""
        found = [iter(made) for made in self._exchanged("each", [*self._made(function)])]
        return [next(found[self._owner(part)]) for part in self.parts]

    def total(self, function: Callable[[T], R]) -> R:
        """Return the sum of a function's results over all items in all processes, which must call this alike.

        Results are numbers, arrays, or tuples of these. They are added in each part, and then the parts in their order,
        so that few are exchanged. Sums of arrays are in double precision.
        """
        counts, made = Counter(self.parts), self._made(function)
        left, number = list(counts), self.group.size
        found: Any = None
        while left:
            some, left = left[:number], left[number:]
            own = [_sum(islice(made, counts[part])) for part in some if self._owner(part) == self.group.rank]
            sums = [iter(each) for each in self._exchanged("total", own)]
            for part in some:
                one = next(sums[self._owner(part)])
                found = _doubled(one) if found is None else added(found, one)
            number = max(self.group.size, _EXCHANGED_BYTES // (1 + _size(found)))
        total: R = found
        return total

    def _exchanged(self, kind: str, results: list[Any]) -> list[Any]:
        return _exchanged(self.group, (kind, *self.parts), results)

    def _owner(self, part: int) -> int:
        return part % self.group.size

    def _made(self, function: Callable[[T], R]) -> Iterator[R]:
        """Yield the results of a function for the items that this process holds."""
        own = self.own
        return in_order(lambda number: function(own[number]), len(own))


def _sum(results: Iterator[Any]) -> Any:
    return reduce(added, results)


def added(first: Any, second: Any) -> Any:
    """Return the sum of numbers, arrays, or tuples of these; of arrays, in double precision."""
    if isinstance(first, tuple):
        return tuple(map(added, first, second))
    return np.add(first, second, dtype=np.float64) if isinstance(first, np.ndarray) else first + second


def _size(value: Any) -> int:
    """Return the number of bytes of arrays, or of tuples of these."""
    return sum(map(_size, value)) if isinstance(value, tuple) else int(getattr(value, "nbytes", 0))


def _doubled(value: Any) -> Any:
    """Return numbers, arrays, or tuples of these, with arrays in double precision."""
    if isinstance(value, tuple):
        return tuple(map(_doubled, value))
    return np.asarray(value, np.float64) if isinstance(value, np.ndarray) else value
