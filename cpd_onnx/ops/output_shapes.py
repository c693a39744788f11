"""Shapes and element types of a node's outputs, from the shapes and values of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import NodeProto, TensorProto

from cpd_onnx.ir.model import Array
from cpd_onnx.ops.evaluate import NOT_COMPUTED, Call
from cpd_onnx.ops.shapes_contrib import CONTRIB
from cpd_onnx.ops.shapes_standard import OPEN, STANDARD, Dims, Function
from cpd_onnx.ops.sizes import whole
from cpd_onnx.ops.traits import traits_of, type_slot

_FUNCTIONS = STANDARD | CONTRIB
_OPTIONAL_INPUTS = {"Clip", "Resize"}
"""Operators of which inputs after the first may be missing without a change of shape."""


def output_shapes(
    key: tuple[str, str], call: Call, shapes: Sequence[Dims | None], values: Sequence[Array | None]
) -> list[Dims | None] | None:
    """Shapes of the outputs of an operator (domain, type); None where onnx has to be asked.

    Outputs that are not listed at the end have no known shape.
    """
    domain, op_type = key
    shapes = shapes[:1] if op_type in _OPTIONAL_INPUTS else shapes
    if not domain and (not shapes or None in shapes):
        return None
    found = _called(_FUNCTIONS, key, call, shapes, values)
    return None if found is None or (key in STANDARD and len(found) != call.outputs) else found


def open_shapes(
    key: tuple[str, str], call: Call, shapes: Sequence[Dims | None], values: Sequence[Array | None]
) -> list[Dims | None] | None:
    """The shape of the first output of operators whose operands may hold open sizes; None where that is not plain."""
    return _called(OPEN, key, call, shapes, values) if shapes and shapes[0] is not None else None


def output_type(node: NodeProto, call: Call, types: Sequence[int | None]) -> int:
    """Element type of the outputs of those nodes, from that of the inputs, None for one that is missing."""
    if traits_of(node).is_boolean:
        return int(TensorProto.BOOL)
    if node.op_type == "Cast":
        return int(call.get("to"))
    if node.op_type == "ConstantOfShape":
        return int(call.attributes["value"].data_type) if "value" in call.attributes else int(TensorProto.FLOAT)
    return next((kind for kind in types[type_slot(node) :] or types if kind is not None), 0)


def _called(
    functions: Mapping[tuple[str, str], Function],
    key: tuple[str, str],
    call: Call,
    shapes: Sequence[Dims | None],
    values: Sequence[Array | None],
) -> list[Dims | None] | None:
    """What the function of an operator says; None where there is none, or it cannot tell."""
    if key not in functions:
        return None
    try:
        found = functions[key](call, shapes, values)
        if found is None:
            return None
        shapes = found if isinstance(found, list) else [found]
        return [dims and tuple(None if size is None else whole(size) for size in dims) for dims in shapes]
    except (*NOT_COMPUTED, AttributeError):
        return None
