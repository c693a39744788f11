"""Values of a combed model's weights: initializers and Constant nodes, of the main graph or a subgraph."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from cpd_onnx.channels.groups import Combed, Weight
from cpd_onnx.ir.model import Array, Lazy, Model, materialize, to_array
from cpd_onnx.shapes.values import Value


def weight_array(model: Model, weight: Weight) -> Array:
    """Return the values of a weight; do not write into them."""
    return materialize(lazy_weight(model, weight))


def lazy_weight(model: Model, weight: Weight) -> Array | Lazy:
    """Return the values of a weight, read on demand where the model is large."""
    source = weight.value.source
    if isinstance(source, TensorProto):
        return (
            model.lazy_array(source.name) if not weight.scope.address and model.has(source.name) else to_array(source)
        )
    assert source is not None
    if source.name == "value":
        return to_array(source.t)
    return np.asarray(helper.get_attribute_value(source), np.int64 if "int" in source.name else np.float32)


def dequantized(combed: Combed, weight: Weight) -> Array:
    """Return the values of a weight; those of a quantised weight as (weight - zero point) * scale."""
    values = weight_array(combed.folded.model, weight)
    quantized = combed.recorder.quantized.get(weight.value)
    if quantized is None or weight.is_float:
        return values
    found = values.astype(np.float32)
    for value, function in ((quantized.zero_point, np.subtract), (quantized.scale, np.multiply)):
        number = None if value is None else constant_of(combed, value)
        if number is not None:
            with np.errstate(over="ignore"):  # infinite then, as in onnxruntime
                found = function(found, quantized.aligned(number.astype(np.float32), found.shape))
    return found


def constant_of(combed: Combed, value: Value) -> Array | None:
    """Return the elements of a weight or of an inferred constant; None for anything else."""
    weight = combed.weight_of.get(value)
    return weight_array(combed.folded.model, weight) if weight is not None else value.value
