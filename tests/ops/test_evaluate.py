"""Evaluation of shape arithmetic: it is right for onnxruntime, and what is too large is not computed."""

from __future__ import annotations

import numpy as np
import pytest

import cpd_onnx as cpd
from cpd_onnx.ops.evaluate import Call, compute_outputs
from cpd_onnx.runtime.sessions import execute, open_model
from tests.support.models import from_text


@pytest.mark.parametrize("operator", ["Less", "Add", "Max"])
def test_masks_of_long_sequences_are_not_computed(operator: str) -> None:
    """A mask of two sequences of 16,000 has 256 million elements."""
    few, many = np.arange(8), np.arange(4096)
    small = compute_outputs(operator, Call({}, 20), [few[:, None], few])
    assert small is not None
    assert small[0].shape == (8, 8)
    assert compute_outputs(operator, Call({}, 20), [many[:, None], many]) is None


@pytest.mark.parametrize(
    ("shape", "axis", "kind"), [((), 1, "uint8"), ((1,), 1, "int8"), ((3,), 0, "int8"), ((2,), 1, "uint8")]
)
def test_rounding_is_that_of_onnxruntime(shape: tuple[int, ...], axis: int, kind: str) -> None:
    sizes = ", ".join(map(str, shape))
    at = f"<axis = {axis}>" if shape else ""
    text = (
        f"(float[3, 2] x, float[{sizes}] s, {kind}[{sizes}] z) => ({kind}[3, 2] q, float[3, 2] y) "
        f"{{ q = QuantizeLinear {at}(x, s, z) y = DequantizeLinear {at}(q, s, z) }}"
    ).replace("[]", "")
    count = int(np.prod(shape))
    scale = np.resize(np.array([0.5, 0.25, 2], np.float32), count).reshape(shape)
    zero = np.resize(np.array([3, 0, 7], kind), count).reshape(shape)
    array = np.array([[0.25, 0.75], [-0.25, 900], [-900, 6.1]], np.float32)
    expected = execute(open_model(cpd.load(from_text(text, values={"s": scale, "z": zero}))), {"x": array})
    rounded = compute_outputs("QuantizeLinear", Call({"axis": axis}, 17), [array, scale, zero])
    assert rounded is not None
    real = compute_outputs("DequantizeLinear", Call({"axis": axis}, 17), [rounded[0], scale, zero])
    assert real is not None
    for found, wanted in zip((*rounded, *real), expected, strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


def test_quantisation_in_blocks_is_not_computed() -> None:
    blocks = [np.zeros((4, 2), np.float32), np.ones((2, 2), np.float32)]
    assert compute_outputs("QuantizeLinear", Call({"axis": 0, "block_size": 2}, 21), blocks) is None
