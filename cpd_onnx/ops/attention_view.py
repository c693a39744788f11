"""Attention of one input as a matrix product: that by the packed matrix of queries, keys and values.

No tensor of a graph holds this product.
"""

from __future__ import annotations

from onnx import NodeProto

from cpd_onnx.ops.matrix_view import PRODUCT, Linear, key_of

_OPERATOR = ("com.microsoft", "Attention")
INPUT, WEIGHT, BIAS = 0, 1, 2
"""Input slots of the operator."""


def projections_of(node: NodeProto) -> Linear | None:
    """Return the product inside the attention of onnxruntime that projects its input itself; None for others."""
    return PRODUCT if key_of(node) == _OPERATOR and len(node.input) > WEIGHT and node.input[WEIGHT] else None
