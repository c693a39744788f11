"""Rounding of a fitted weight to the steps of its integers, in which inputs make up for the rounding of others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpd_onnx.fitting.least_squares import Matrix
from cpd_onnx.ops.matrix_view import Vector

_BLOCK = 64
"""Number of features that are rounded before the others are corrected, which saves memory traffic (heuristic)."""
_FINEST = 1 / 64
"""Smallest factor by which a scale shrinks, so that int32 biases, whose scale shrinks with it, do not overflow
(heuristic)."""


@dataclass(frozen=True, eq=False)
class Steps:
    """The integers of a quantised weight in the layout of its matrix: weight = (integer - zero point) * scale.

    Attributes:
        cells: Number of the scale of each element [groups, features, outputs].
        scales: The scales.
        zero_points: Zero point of each element, or one for all.
        limits: Smallest and largest integer.
        is_free: Whether the scales may be changed.
    """

    cells: npt.NDArray[np.int64]
    scales: Vector
    zero_points: Matrix
    limits: tuple[int, int]
    is_free: bool

    def rounded(self, matrix: Matrix, moments: Matrix) -> tuple[Matrix, Vector]:
        """Return a weight in steps that is as near as possible to a matrix, and the scales.

        Features are rounded one after the other, and the following ones are changed so that the products change least
        (Frantar et al., GPTQ, ICLR 2023).

        Args:
            matrix: The weight [groups, features, outputs].
            moments: Second moments of the features, regularized [groups, features, features].
        """
        if not (np.isfinite(matrix).all() and np.isfinite(moments).all()):
            return matrix, self.scales
        scales = self.fitting(matrix) if self.is_free else self.scales
        each = scales[self.cells]
        factors = np.linalg.cholesky(np.linalg.inv(moments))
        zeros = np.broadcast_to(self.zero_points, matrix.shape)
        rest, found = matrix.copy(), np.empty_like(matrix)
        for start in range(0, matrix.shape[1], _BLOCK):
            end = min(start + _BLOCK, matrix.shape[1])
            errors = np.empty_like(rest[:, start:end])
            for feature in range(start, end):
                found[:, feature] = self.nearest(rest[:, feature], each[:, feature], zeros[:, feature])
                error = (rest[:, feature] - found[:, feature]) / factors[:, feature, feature, None]
                errors[:, feature - start] = error
                rest[:, feature + 1 : end] -= factors[:, feature + 1 : end, feature, None] * error[:, None]
            rest[:, end:] -= factors[:, end:, start:end] @ errors
        return found, scales

    def nearest(self, values: Matrix, scales: Matrix, zero_points: Matrix) -> Matrix:
        """Return the nearest numbers that integers stand for."""
        return (np.clip(np.rint(values / scales) + zero_points, *self.limits) - zero_points) * scales

    def fitting(self, matrix: Matrix) -> Vector:
        """Return the smallest scales, as float32 stores them, with which all elements of a matrix are in range."""
        low, high = (np.abs(limit - self.zero_points) for limit in self.limits)
        found = self.needed(matrix, low, high)
        if (self.scales < 0).any():  # as quantisers of blocks choose where the largest element is positive
            turned = self.needed(matrix, high, low)
            found = np.where(turned < found, -turned, found)
        floor = np.abs(self.scales) * _FINEST
        found = np.where(np.abs(found) < floor, floor, found)
        return np.where(np.isfinite(found), found, self.scales).astype(np.float32).astype(np.float64)

    def needed(self, matrix: Matrix, low: Matrix, high: Matrix) -> Vector:
        """Return the scales needed for that many integers below and above zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            each = np.abs(matrix) / np.where(matrix < 0, low, high)
        found = np.zeros(len(self.scales))
        np.maximum.at(found, self.cells.ravel(), np.nan_to_num(each, nan=0.0, posinf=np.inf).ravel())
        return found
