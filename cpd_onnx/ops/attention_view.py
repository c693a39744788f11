"""Attention of one input as a matrix product: that by the packed matrix of queries, keys and values.

    rows [1, positions, features]  x  matrix [1, features, queries + keys + values]

No tensor of a graph holds this product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from cpd_onnx.ir.model import Array
from cpd_onnx.ops.matrix_view import Window, key_of

_OPERATOR = ("com.microsoft", "Attention")
INPUT, WEIGHT, BIAS = 0, 1, 2
"""Input slots of the operator."""


@dataclass(frozen=True)
class Projections:
    """The product by the packed weight [features, queries + keys + values]."""

    groups: int = 1
    windows: tuple[Window, ...] = ()
    keeps_pads: bool = True
    in_axis: int = -1
    out_axis: int = -1
    weight_axis: int = 1
    taps: int = 1
    is_stacked: bool = False
    stack: tuple[int, ...] = ()

    def resized(self, channels: tuple[int, int, int], kernel: tuple[int, ...]) -> Projections:
        """Return the product itself, which depends on no number of channels."""
        return self

    def count(self, out: Sequence[int]) -> int:
        """Return the number of positions of all samples, from the shape of the output."""
        return math.prod(out[:-1])

    def rows(self, data: Array, places: Array) -> Array:
        """Return the features at some positions."""
        return np.asarray(data.reshape(-1, data.shape[-1])[places][None])

    def targets(self, out: Array, places: Array) -> Array:
        """Return the output of the operator at some positions, which is not the product."""
        return self.rows(out, places)

    def matrix(self, weight: Array) -> Array:
        """Return a weight as a matrix [1, features, outputs]."""
        return np.asarray(weight[None])

    def weight(self, matrix: Array) -> Array:
        """Return a matrix as a weight."""
        return np.asarray(matrix[0])


def projections_of(node: NodeProto) -> Projections | None:
    """Return the product inside the attention of onnxruntime that projects its input itself; None for others."""
    return Projections() if key_of(node) == _OPERATOR and len(node.input) > WEIGHT and node.input[WEIGHT] else None
