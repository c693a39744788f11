"""The moments of a fit and its linear systems."""

from __future__ import annotations

import numpy as np
import pytest

from cpd_onnx.fitting.least_squares import Moments, _solver


@pytest.mark.parametrize("features", [9, 96])
def test_a_fit_is_that_of_all_rows_that_were_added(features: int) -> None:
    """Also after rows are added to moments that were used already, and for several ridges and right-hand sides."""
    rng = np.random.default_rng(0)
    moments = Moments(centred=True)
    added: list[np.ndarray] = []
    for _ in range(2):
        added.append(rng.standard_normal((2, 300, features)).astype(np.float32))
        moments.add(added[-1])
        rows = np.concatenate(added, axis=1).astype(np.float64)
        rows -= rows.mean(axis=1, keepdims=True)
        gram = rows.swapaxes(1, 2) @ rows / rows.shape[1]
        for ridge, count in ((1e-3, 1), (1e-3, 4), (1e-1, 4)):
            right = rng.standard_normal((2, features, count))
            size = np.trace(gram, axis1=1, axis2=2)[:, None, None] / features
            wanted = np.linalg.solve(gram + ridge * size * np.eye(features), right)
            np.testing.assert_allclose(moments.solved(ridge, right), wanted, rtol=1e-4, atol=1e-5)


def test_a_matrix_that_rounding_has_made_indefinite_is_solved_all_the_same() -> None:
    matrix = np.diag([1.0] * 95 + [-1e-9])[None]
    right = np.ones((1, 96, 2))
    np.testing.assert_allclose(matrix @ _solver(matrix)(right), right)
