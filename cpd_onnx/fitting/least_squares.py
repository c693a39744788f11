"""Least squares on what runs through a model: rows of activations, their moments, the fit that changes least."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from cpd_onnx.ir.model import Array
from cpd_onnx.ops.matrix_view import Linear

Matrix: TypeAlias = npt.NDArray[np.float64]

MAX_FEATURES = 8192
"""Features beyond which nothing is fitted: their moments alone would take a gigabyte."""
_ELEMENTS = 1 << 26
"""Numbers in the rows of one fit."""


def one_thread() -> AbstractContextManager[object]:
    """Linear algebra on one thread: on several the last bits of its sums would depend on how many there are."""
    limits: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limits


class Sampler:
    """Draws the rows of fits: places of all samples, as many as make sense."""

    def __init__(self, rows: int, seed: int) -> None:
        """Draw at most about so many rows for each fit."""
        self._rows, self._random = rows, np.random.default_rng(seed)

    def rows(
        self, linear: Linear, data: Sequence[Array], targets: Sequence[Array]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Features and targets at the same places [groups, rows, features or outputs], of all batches."""
        first = linear.rows(_single(data[0]), np.arange(1))
        groups, samples, features = first.shape
        most = max(64, min(self._rows, _ELEMENTS // max(1, groups * features)))
        limit = max(1, most // (len(data) * samples))
        found: list[Array] = []
        aims: list[Array] = []
        for x, y in zip(data, targets, strict=True):
            count = linear.count(y.shape)
            places = np.arange(count) if count <= limit else np.sort(self._random.choice(count, limit, replace=False))
            found.append(linear.rows(_single(x), places))
            aims.append(linear.targets(_single(y), places))
        return np.concatenate(found, axis=1), np.concatenate(aims, axis=1)


def _single(array: Array) -> Array:
    return np.asarray(array, np.float32)


class Moments:
    """Means and products of features, group by group.

    Attributes:
        mean: of each feature [groups, 1, features]; zero where a fit has no constant.
        gram: mean products of what is left [groups, features, features].
    """

    def __init__(self, rows: npt.NDArray[np.float32], *, centred: bool) -> None:
        """Take rows [groups, rows, features]."""
        groups, self._count, features = rows.shape
        self._rows = rows
        self.mean: Matrix = np.zeros((groups, 1, features))
        if centred:
            self.mean = rows.mean(axis=1, keepdims=True, dtype=np.float64)
        self.gram: Matrix = (rows.swapaxes(1, 2) @ rows).astype(np.float64) / self._count
        self.gram -= self.mean.swapaxes(1, 2) @ self.mean

    def lift(self, ridge: float) -> Matrix:
        """A share of the mean square of a feature [groups, 1, 1]."""
        size = np.trace(self.gram, axis1=1, axis2=2) / max(1, self.gram.shape[1])
        return np.asarray(ridge * np.maximum(size, np.finfo(np.float32).tiny)[:, None, None])

    def lifted(self, ridge: float) -> Matrix:
        """The products with that on their diagonal, so that they can be inverted."""
        return np.asarray(self.gram + self.lift(ridge) * np.eye(self.gram.shape[1]))

    def fit(self, aims: Array, start: Matrix, ridge: float) -> tuple[Matrix, Matrix]:
        """The matrix and the constant that come nearest to the aims, held to where they start by the ridge.

        Args:
            aims: [groups, rows, outputs].
            start: [groups, features, outputs].
            ridge: how strongly, as a share of the mean square of a feature.
        """
        middle = aims.mean(axis=1, keepdims=True, dtype=np.float64) if self.mean.any() else np.zeros((len(aims), 1, 1))
        cross = (self._rows.swapaxes(1, 2) @ np.asarray(aims, np.float32)).astype(np.float64) / self._count
        cross -= self.mean.swapaxes(1, 2) * middle
        fitted = np.linalg.solve(self.lifted(ridge), cross + self.lift(ridge) * start)
        return fitted, middle - self.mean @ fitted
