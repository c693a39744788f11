"""Size of the deployed file: that of the original, or of its conversion to int8 or float16."""

from __future__ import annotations

import math

from onnx import TensorProto

from cpd_onnx.channels.costs import Term
from cpd_onnx.channels.groups import Combed, Weight
from cpd_onnx.ir.model import element_bytes
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.values import COMPUTABLE_TYPES

STORED = ("int8", "float16")
"""Element types that a model can be deployed in, see `deploy --int8` and `deploy --half float16`."""
_SCALES = 5.0
"""Bytes of the float32 scale and the int8 zero point of each channel of a quantised weight."""
_BIAS = 12.0
"""Bytes of each element of a quantised bias: int32, with a scale and a zero point."""
_SHIFT = 2
"""Input slot of BatchNormalization for what is added, which remains as a bias when it becomes part of a convolution."""


def element_size(dtype: int, stored_as: str) -> float:
    """Return the bytes of an element of an ONNX type in the deployed model."""
    if dtype not in COMPUTABLE_TYPES:
        return element_bytes(dtype)
    return {"int8": 1.0, "float16": 2.0}.get(stored_as, element_bytes(dtype))


def flash_terms(combed: Combed, stored_as: str) -> list[Term]:
    """Return the bytes of the deployed file as a sum over products of axes.

    The rest of the file, its graph and names, is taken for that of the original; the nodes that `deploy` adds for int8
    are not counted, since deployed formats have none. For int8, batch normalisation becomes part of convolutions.
    """
    terms: list[Term] = []
    in_file = 0.0
    for weight in combed.weights:
        axes = tuple(weight.axes[0])
        in_file += element_bytes(weight.value.dtype) * math.prod(map(len, axes))
        if stored_as == "int8" and _is_merged(weight):
            continue
        terms.append((_stored_bytes(weight, stored_as), axes))
        if stored_as == "int8" and weight.value.dtype == TensorProto.FLOAT and not weight.is_vector:
            terms.append((_SCALES, axes[:1]))
    model = combed.folded.model
    return [*terms, (model.data_bytes() + model.proto.ByteSize() - in_file, ())]


def _is_merged(weight: Weight) -> bool:
    """Return whether a weight becomes part of others as batch normalisation becomes part of convolutions."""
    nodes = [use.use.scope.nodes[use.use.node] for use in weight.uses]
    slots = {use.use.slot for use in weight.uses}
    return bool(nodes) and all(traits_of(node).stores_statistics for node in nodes) and _SHIFT not in slots


def _stored_bytes(weight: Weight, stored_as: str) -> float:
    if stored_as == "int8" and weight.is_vector and weight.value.dtype in COMPUTABLE_TYPES:
        return _BIAS
    return element_size(weight.value.dtype, stored_as)
