"""Least squares on activations: sampled rows, their moments, and the ridge fit that changes weights least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve
from threadpoolctl import threadpool_limits

from cpd_onnx.ir.model import Array
from cpd_onnx.ops.matrix_view import Linear

Matrix: TypeAlias = npt.NDArray[np.float64]
Rows: TypeAlias = npt.NDArray[np.float32]
"""Rows of features or targets [groups, rows, features or outputs]."""
Sums: TypeAlias = tuple[int, Matrix, Matrix]
"""Number of rows, sums of their features [groups, 1, features], and of the products of each two [groups, features,
features]."""

MAX_FEATURES = 8192
"""Maximum number of features of a fit, at which its moments take about a gigabyte (heuristic)."""
_CHOLESKY = 64
"""Number of features from which a matrix is solved by Cholesky's factors (heuristic)."""
_ELEMENTS = 1 << 26
"""Maximum number of elements in the rows of one fit (heuristic)."""


def one_thread() -> AbstractContextManager[object]:
    """Run linear algebra in the block on one thread, so that results do not depend on the number of threads."""
    limits: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limits


@dataclass(frozen=True)
class Sampler:
    """Draws the rows of fits: positions in all samples, up to a limit.

    The positions depend on the numbers of the fit and of the batch, not on what was drawn before, so that features and
    targets can be read in separate runs.

    Attributes:
        rows: Approximate number of rows for each fit.
        seed: Seed of the choice.
        sizes: Number of samples in each batch.
    """

    rows: int
    seed: int
    sizes: Sequence[int]

    def most(self, matrix: Sequence[int]) -> int:
        """Return the approximate number of rows for a matrix of a shape (groups, features, outputs)."""
        return max(64, min(self.rows, _ELEMENTS // max(1, matrix[0] * max(matrix[1:]))))

    def places(self, fit: tuple[int, int], linear: Linear, matrix: Sequence[int], out: Array) -> Array:
        """Return positions in a batch.

        Args:
            fit: Numbers of the fit and of the batch.
            linear: The operator.
            matrix: Shape of its matrix (groups, features, outputs).
            out: Output of the operator, or a tensor of the same shape.
        """
        count = linear.count(out.shape)
        each = linear.targets(out, np.arange(1)).shape[1]
        limit = max(1, round(self.most(matrix) * self.sizes[fit[1]] / sum(self.sizes) / each))
        if count <= limit:
            return np.arange(count)
        return np.sort(np.random.default_rng([self.seed, *fit]).choice(count, limit, replace=False))


def single(array: Array) -> Array:
    """Return an array as float32."""
    return np.asarray(array, np.float32)


class Moments:
    """First and second moments of features, for each group.

    Attributes:
        count: Number of rows.
    """

    def __init__(self, sums: Sums, *, centred: bool) -> None:
        """Create moments of rows by their sums, see `summed`; uncentred ones if the fit has no constant."""
        self.count, self._total, self._products = sums
        self._is_centred = centred
        self._gram: Matrix | None = None
        self._solver: tuple[float, Callable[[Matrix], Matrix]] | None = None

    @property
    def mean(self) -> Matrix:
        """Mean of each feature [groups, 1, features]; zero if the fit has no constant."""
        return self._total / max(1, self.count) * self._is_centred

    @property
    def gram(self) -> Matrix:
        """Mean products of the centred features [groups, features, features]."""
        if self._gram is None:
            mean = self.mean
            self._gram = np.asarray(self._products / max(1, self.count) - mean.swapaxes(1, 2) @ mean)
        return self._gram

    def about(self, centre: Matrix) -> Matrix:
        """Return the mean products of the differences of the features from a centre [groups, 1, features]."""
        mean, back = self._total / max(1, self.count), centre.swapaxes(-1, -2) if centre.ndim > 1 else centre
        if not centre.any():
            return np.asarray(self._products / max(1, self.count))
        cross = back @ mean
        return np.asarray(self._products / max(1, self.count) - cross - cross.swapaxes(1, 2) + back @ centre)

    def part(self, places: npt.NDArray[np.int64]) -> Moments:
        """Return the moments of some features [groups, features]."""
        groups = np.arange(len(places))[:, None]
        total = self._total[groups, 0, places][:, None]
        products = self._products[groups[:, :, None], places[:, :, None], places[:, None]]
        return Moments((self.count, total, products), centred=self._is_centred)

    def lifted(self, ridge: float) -> Matrix:
        """Return the mean products with the ridge added to their diagonal, which makes them invertible."""
        gram = self.gram
        return np.asarray(gram + lift(gram, ridge) * np.eye(gram.shape[1]))

    def solved(self, ridge: float, right: Matrix) -> Matrix:
        """Return the solution of the linear system with the matrix `lifted`.

        Right-hand sides and solution have the shape [groups, features, outputs].
        The factors for the last ridge are kept, since a fit solves for several right-hand sides with the best one.
        """
        if self._solver is None or self._solver[0] != ridge:
            self._solver = ridge, _solver(self.lifted(ridge))
        return self._solver[1](right)


def _solver(matrices: Matrix) -> Callable[[Matrix], Matrix]:
    """Return a function that solves linear systems of positive definite matrices [groups, n, n].

    Cholesky's factors take half of the time of those of general matrices, which serve where rounding has made a matrix
    indefinite, and where matrices are so small that calling a function for each takes longer.
    """
    if matrices.shape[1] >= _CHOLESKY:
        with suppress(np.linalg.LinAlgError):
            factors = [cho_factor(matrix, lower=True, check_finite=False) for matrix in matrices]
            return lambda right: np.stack(
                [cho_solve(each, part, check_finite=False) for each, part in zip(factors, right, strict=True)]
            )
    return lambda right: np.asarray(np.linalg.solve(matrices, right))


def lift(gram: Matrix, ridge: float) -> Matrix:
    """Return a ridge as a fraction of the mean square of a feature [groups, 1, 1]."""
    size = np.trace(gram, axis1=1, axis2=2) / max(1, gram.shape[1])
    return np.asarray(ridge * np.maximum(size, np.finfo(np.float32).tiny)[:, None, None])


def summed(rows: Rows) -> Sums:
    """Return the sums of rows [groups, rows, features]; those of products in their precision, until they are added."""
    products: npt.NDArray[Any] = rows.swapaxes(1, 2) @ rows
    return rows.shape[1], rows.sum(axis=1, keepdims=True, dtype=np.float64), products
