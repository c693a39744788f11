"""Least squares on activations: sampled rows, their moments, and the ridge fit that changes weights least."""

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
"""Maximum number of features of a fit, at which its moments take about a gigabyte (heuristic)."""
_ELEMENTS = 1 << 26
"""Maximum number of elements in the rows of one fit (heuristic)."""


def one_thread() -> AbstractContextManager[object]:
    """Run linear algebra in the block on one thread, so that results do not depend on the number of threads."""
    limits: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limits


class Sampler:
    """Draws the rows of fits: positions in all samples, up to a limit."""

    def __init__(self, rows: int, seed: int) -> None:
        """Create a sampler that draws at most about `rows` rows for each fit."""
        self._rows, self._random = rows, np.random.default_rng(seed)

    def rows(
        self, linear: Linear, data: Sequence[Array], targets: Sequence[Array]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return features and targets at the same positions of all batches [groups, rows, features or outputs]."""
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
    """First and second moments of features, for each group.

    Attributes:
        mean: Mean of each feature [groups, 1, features]; zero if the fit has no constant.
        gram: Mean products of the centred features [groups, features, features].
    """

    def __init__(self, rows: npt.NDArray[np.float32], *, centred: bool) -> None:
        """Compute the moments of rows [groups, rows, features]; uncentred ones if the fit has no constant."""
        groups, self._count, features = rows.shape
        self._rows = rows
        self.mean: Matrix = np.zeros((groups, 1, features))
        if centred:
            self.mean = rows.mean(axis=1, keepdims=True, dtype=np.float64)
        self.gram: Matrix = (rows.swapaxes(1, 2) @ rows).astype(np.float64) / self._count
        self.gram -= self.mean.swapaxes(1, 2) @ self.mean

    def lift(self, ridge: float) -> Matrix:
        """Return the ridge as a fraction of the mean square of a feature [groups, 1, 1]."""
        size = np.trace(self.gram, axis1=1, axis2=2) / max(1, self.gram.shape[1])
        return np.asarray(ridge * np.maximum(size, np.finfo(np.float32).tiny)[:, None, None])

    def lifted(self, ridge: float) -> Matrix:
        """Return the products with the ridge added to their diagonal, which makes them invertible."""
        return np.asarray(self.gram + self.lift(ridge) * np.eye(self.gram.shape[1]))

    def fit(self, aims: Array, start: Matrix, ridge: float) -> tuple[Matrix, Matrix]:
        """Return the matrix and the constant of the least-squares fit, regularized towards the initial matrix.

        Args:
            aims: Targets [groups, rows, outputs].
            start: Initial matrix [groups, features, outputs].
            ridge: Strength of the regularization, as a fraction of the mean square of a feature.
        """
        middle = aims.mean(axis=1, keepdims=True, dtype=np.float64) if self.mean.any() else np.zeros((len(aims), 1, 1))
        cross = (self._rows.swapaxes(1, 2) @ np.asarray(aims, np.float32)).astype(np.float64) / self._count
        cross -= self.mean.swapaxes(1, 2) * middle
        fitted = np.linalg.solve(self.lifted(ridge), cross + self.lift(ridge) * start)
        return fitted, middle - self.mean @ fitted
