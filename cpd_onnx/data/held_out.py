"""Held-out samples: a part of the data that nothing is fitted to, on which the result is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cpd_onnx.data.sources import Batch, Source
from cpd_onnx.runtime.sessions import sample_count

MOST = 1000
"""Maximum number of samples that are held out (heuristic)."""
_SEED = 20240
"""Seed of the choice, which is the same in all runs, so that their measurements can be compared."""


@runtime_checkable
class Divisible(Source, Protocol):
    """A source that can be divided, because each of its samples can be read by its number."""

    def read(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Return the samples with these numbers."""


class Rows:
    """Some of the samples of a source."""

    def __init__(self, source: Divisible, rows: npt.NDArray[np.int64]) -> None:
        """Take the samples with these numbers, in ascending order."""
        self.source, self.rows = source, np.sort(rows)
        self.count = len(rows)

    def read(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Return the samples with these numbers, counted among the samples that were taken."""
        return self.source.read(self.rows[rows])

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield every sample once, shuffled if there is a seed."""
        order = np.arange(self.count) if seed is None else np.random.default_rng(seed).permutation(self.count)
        for start in range(0, self.count, size):
            yield self.read(order[start : start + size])


@dataclass(frozen=True)
class Division:
    """Samples in two parts.

    Attributes:
        first: Samples that may be fitted to.
        second: Samples for measurements.
    """

    first: Source
    second: Source


def divide(source: Source, fraction: float, most: int = MOST) -> Division | None:
    """Return the source in two parts, the second of which has that fraction of the samples, at random.

    None if the source cannot be divided, because it is a function, a loader or synthetic, or is too small for both
    parts. A sample that occurs twice may be in both parts, as may neighbouring frames of a video.
    """
    count = source.count
    if not isinstance(source, Divisible) or count is None:
        return None
    held = min(most, round(fraction * count))
    if not 0 < held < count:
        return None
    order = np.random.default_rng(_SEED).permutation(count)
    return Division(Rows(source, order[held:]), Rows(source, order[:held]))


class _First:
    """The first batches of a source, up to a number of samples."""

    count = None

    def __init__(self, source: Source, most: int) -> None:
        self.source, self.most = source, most

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        seen = 0
        for batch in self.source.batches(size, seed=seed):
            yield batch
            seen += sample_count(batch)
            if seen >= self.most:
                return


def at_most(source: Source, most: int = MOST) -> Source:
    """Return so many samples of a source: at random or, if it cannot be divided and may be endless, the first ones."""
    division = divide(source, 1.0, most)
    if division is not None:
        return division.second
    return source if source.count is not None and source.count <= most else _First(source, most)
