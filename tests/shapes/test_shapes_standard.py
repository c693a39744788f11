"""Shapes that are computed here are those that the operators have."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from cpd_onnx.ir.model import attributes_of
from cpd_onnx.ops.evaluate import EVALUATORS, Call
from cpd_onnx.ops.output_shapes import output_shapes, output_type
from tests.support.models import operator_cases

CASES = {case.name: case for case in operator_cases() if len(case.model.graph.node) == 1}


def test_official_operator_tests() -> None:
    """For the inputs of each test: shape and type of its outputs, or nothing."""
    answered = set()
    for name, case in CASES.items():
        node, (inputs, outputs) = case.model.graph.node[0], case.data_sets[0]
        if not all(isinstance(array, np.ndarray) for array in (*inputs, *outputs)):
            continue
        given = dict(zip([i.name for i in case.model.graph.input], inputs, strict=False))
        opset = next((o.version for o in case.model.opset_import if o.domain in ("", "ai.onnx")), 1)
        call = Call(attributes_of(node), opset, len(node.output))
        arrays = [given.get(i) for i in node.input]
        shapes = [None if array is None else array.shape for array in arrays]
        found = output_shapes(("", node.op_type), call, shapes, arrays) if not node.domain else None
        if found is None:
            continue
        answered.add(node.op_type)
        assert found == [array.shape for array in outputs], name
        types = [0 if a is None else helper.np_dtype_to_tensor_dtype(a.dtype) for a in arrays]
        expected = {helper.np_dtype_to_tensor_dtype(array.dtype) for array in outputs}
        assert {output_type(node, call, types)} == expected, name
    assert len(answered) > 60


@pytest.mark.parametrize(("axis", "expected"), [(-1, (6, 4)), (-3, (1, 24)), (0, (1, 24)), (3, (24, 1)), (1, (2, 12))])
def test_axes_of_flatten_count_from_the_rank(axis: int, expected: tuple[int, ...]) -> None:
    call = Call({"axis": axis}, 18)
    assert output_shapes(("", "Flatten"), call, [(2, 3, 4)], [None]) == [expected]
    assert EVALUATORS["Flatten"](call, np.zeros((2, 3, 4))).shape == expected


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize(("kernel", "stride", "pads"), [(2, 2, (0, 0)), (3, 2, (1, 1)), (3, 1, (0, 2))])
def test_pools_that_round_up(size: int, kernel: int, stride: int, pads: tuple[int, int]) -> None:
    """As onnxruntime does, where the last window begins inside the image for all sizes."""
    attributes = {"kernel_shape": [kernel], "strides": [stride], "pads": list(pads), "ceil_mode": 1}
    found = output_shapes(("", "AveragePool"), Call(attributes, 19), [(1, 2, size)], [None])
    node = helper.make_node("AveragePool", ["x"], ["y"], **attributes)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, n]) for name, n in (("x", size), ("y", None)))
    model = helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=[helper.make_opsetid("", 19)])
    model.ir_version = 9
    runtime = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = runtime.run(None, {"x": np.zeros((1, 2, size), np.float32)})
    assert found == [expected.shape]
    assert output_shapes(("com.microsoft", "QLinearAveragePool"), Call(attributes, 1), [(1, 2, size)], [None]) == found


@pytest.mark.parametrize(
    ("op_type", "attributes", "shapes", "values"),
    [
        ("Conv", {}, [(1, 4, 8, 8), (4, 3, 3, 3)], [None, None]),
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [3, 3], "ceil_mode": 1}, [(1, 3, 7, 7)], [None]),
        ("Add", {}, [(2, 3), (2, 4)], [None, None]),
        ("MatMul", {}, [(3,), (3, 4)], [None, None]),
        ("Reshape", {}, [(2, 3), (1,)], [None, np.asarray([5])]),
        ("Reshape", {}, [(2, 3), (2,)], [None, None]),
        ("Squeeze", {}, [(1, 3)], [None]),
        ("Relu", {}, [None], [None]),
    ],
)
def test_what_is_not_plain_is_left_to_onnx(
    op_type: str, attributes: dict[str, Any], shapes: list[Any], values: list[Any]
) -> None:
    assert output_shapes(("", op_type), Call(attributes, 17), shapes, values) is None


def test_broadcasting_by_attribute_is_left_to_onnx() -> None:
    assert output_shapes(("", "Add"), Call({"broadcast": 1, "axis": 0}, 6), [(2, 3), (2,)], [None, None]) is None


def test_a_made_constant_has_the_type_of_its_value() -> None:
    value = helper.make_tensor("v", TensorProto.DOUBLE, [1], [1.0])
    node = helper.make_node("ConstantOfShape", ["n"], ["y"])
    assert output_type(node, Call({"value": value}, 17), [TensorProto.INT64]) == TensorProto.DOUBLE
    assert output_type(node, Call({}, 17), [TensorProto.INT64]) == TensorProto.FLOAT
