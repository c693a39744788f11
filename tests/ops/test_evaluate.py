"""Evaluation of shape arithmetic: what is too large is not computed."""

from __future__ import annotations

import numpy as np
import pytest

from cpd_onnx.ops.evaluate import Call, compute_outputs


@pytest.mark.parametrize("operator", ["Less", "Add", "Max"])
def test_masks_of_long_sequences_are_not_computed(operator: str) -> None:
    """A mask of two sequences of 16,000 has 256 million elements."""
    few, many = np.arange(8), np.arange(4096)
    small = compute_outputs(operator, Call({}, 20), [few[:, None], few])
    assert small is not None
    assert small[0].shape == (8, 8)
    assert compute_outputs(operator, Call({}, 20), [many[:, None], many]) is None
