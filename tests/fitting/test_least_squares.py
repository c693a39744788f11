"""The moments of a fit and its linear systems."""

from __future__ import annotations

import numpy as np
import pytest

from cpd_onnx.fitting.least_squares import Moments, _solver, summed
from cpd_onnx.runtime.shards import added


@pytest.mark.parametrize("features", [9, 96])
def test_a_fit_is_that_of_all_rows_that_were_added(features: int) -> None:
    """For several ridges and right-hand sides, of which the factors for the last ridge serve."""
    rng = np.random.default_rng(0)
    blocks = [rng.standard_normal((2, 300, features)).astype(np.float32) for _ in range(2)]
    moments = Moments(added(*map(summed, blocks)), centred=True)
    rows = np.concatenate(blocks, axis=1).astype(np.float64)
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


def test_moments_of_some_features_are_those_of_their_rows() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 50, 6)).astype(np.float32) + 1
    places = np.array([[0, 3, 4], [1, 2, 5]])
    whole, part = (
        Moments(summed(each), centred=True) for each in (rows, np.take_along_axis(rows, places[:, None], axis=2))
    )
    found = whole.part(places)
    assert found.count == part.count
    np.testing.assert_allclose(found.gram, part.gram, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.mean, part.mean)


@pytest.mark.parametrize("size", [1, 6])
def test_moments_about_a_centre_are_those_of_the_differences(size: int) -> None:
    rng = np.random.default_rng(0)
    rows, centre = rng.standard_normal((2, 50, 6)).astype(np.float32), rng.standard_normal((2, 1, 6))
    centre = centre if size > 1 else np.zeros(1)
    moments = Moments(summed(rows), centred=False)
    away = rows.astype(np.float64) - centre
    np.testing.assert_allclose(moments.about(centre), away.swapaxes(1, 2) @ away / 50, rtol=1e-4, atol=1e-5)
