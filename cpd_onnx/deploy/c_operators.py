"""Operators that the generator of C does not know, replaced by others that compute the same."""

from __future__ import annotations

import math

import numpy as np
from onnx import NodeProto, helper

from cpd_onnx.ir.model import Model
from cpd_onnx.ops.matrix_view import operands_of
from cpd_onnx.ops.quantized_view import QLINEAR_MATMUL
from cpd_onnx.shapes.editor import put_nodes
from cpd_onnx.shapes.inference import fold
from cpd_onnx.shapes.values import Scope


def with_known_operators(model: Model) -> Model:
    """Return a model without the operators that the generator does not know; the given one if there are none.

    QLinearMatMul with a scale for each column of its weight becomes a QLinearConv with a kernel of one element, between
    two Reshapes, which cost nothing in a program.
    """
    scope = fold(model).scope
    positions = [place for place, node in enumerate(model.graph.node) if _is_per_column(model, node, scope)]
    if not positions:
        return model
    changed = model.copy()
    nodes: list[NodeProto] = []
    for place, node in enumerate(model.graph.node):
        nodes += _as_convolution(changed, node, scope) if place in positions else [node]
    put_nodes(changed, nodes, {model.graph.node[place].input[QLINEAR_MATMUL.weight] for place in positions})
    return changed


def _is_per_column(model: Model, node: NodeProto, scope: Scope) -> bool:
    """Return whether a node is a QLinearMatMul with a stored matrix and a scale for each of its columns."""
    slots = QLINEAR_MATMUL
    if operands_of(node) is not slots or not model.has(node.input[slots.weight]):
        return False
    given = (scope.values.get(node.input[slot]) for slot in (slots.weight_level[0], slots.weight, slots.data))
    scale, matrix, data = (() if value is None else tuple(value.shape or ()) for value in given)
    return len(matrix) == 2 and len(data) >= 2 and scale == matrix[1:] and scale != (1,)


def _as_convolution(model: Model, node: NodeProto, scope: Scope) -> list[NodeProto]:
    """Return the nodes in place of a QLinearMatMul, and add their weights to the model."""
    slots = QLINEAR_MATMUL
    data, out = scope.values[node.input[slots.data]], node.output[0]
    matrix = model.array(node.input[slots.weight])
    shape = tuple(data.shape or ())
    rows = math.prod(shape[:-1])
    taken = model.names()
    names = {}
    for what in ("data", "weight", "product", "before", "after"):
        name = f"{out}_{what}"
        while name in taken:
            name += "_"
        names[what] = name
    kernel = np.ascontiguousarray(matrix.T)[:, :, None, None]
    for what, array in (
        ("weight", kernel),
        ("before", np.array([rows, shape[-1], 1, 1], np.int64)),
        ("after", np.array([*shape[:-1], matrix.shape[1]], np.int64)),
    ):
        model.add_initializer(names[what], array)
    given = list(node.input)
    given[slots.data], given[slots.weight] = names["data"], names["weight"]
    return [
        helper.make_node("Reshape", [node.input[slots.data], names["before"]], [names["data"]]),
        helper.make_node("QLinearConv", given, [names["product"]], name=node.name, kernel_shape=[1, 1]),
        helper.make_node("Reshape", [names["product"], names["after"]], [out]),
    ]
