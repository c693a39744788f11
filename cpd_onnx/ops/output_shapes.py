"""Shapes and element types of a node's outputs, computed from the shapes and values of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import NodeProto, TensorProto

from cpd_onnx.ir.model import Array
from cpd_onnx.ops.evaluate import NOT_COMPUTED, Call
from cpd_onnx.ops.shapes_contrib import CONTRIB
from cpd_onnx.ops.shapes_standard import OPEN, STANDARD, Dims, Function
from cpd_onnx.ops.sizes import as_size
from cpd_onnx.ops.traits import traits_of, type_slot

_FUNCTIONS = STANDARD | CONTRIB
"""All shape functions by (domain, operator)."""
_OPTIONAL_INPUTS = {"Clip", "Resize"}
"""Operators whose inputs after the first may be absent or have an unknown shape."""


def output_shapes(
    key: tuple[str, str], call: Call, shapes: Sequence[Dims | None], values: Sequence[Array | None]
) -> list[Dims | None] | None:
    """Return the shapes of the outputs of an operator (domain, type); None if there is no shape function for the case.

    The list may be shorter than the outputs; shapes of the remaining ones are unknown.
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
    """Return the shape of the first output of an operator whose operands may hold symbolic sizes; None if unknown."""
    return _called(OPEN, key, call, shapes, values) if shapes and shapes[0] is not None else None


def output_type(node: NodeProto, call: Call, types: Sequence[int | None], slot: int = 0) -> int:
    """Return the element type of an output of a node with a shape function.

    `types` are those of the inputs, None for an absent one.
    """
    if slot in traits_of(node).integer_outputs:
        return int(TensorProto.INT32)
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
    """Return the shapes by the shape function of an operator; None if there is none or it does not cover the case."""
    if key not in functions:
        return None
    try:
        found = functions[key](call, shapes, values)
        if found is None:
            return None
        shapes = found if isinstance(found, list) else [found]
        return [dims and tuple(None if size is None else as_size(size) for size in dims) for dims in shapes]
    except (*NOT_COMPUTED, AttributeError):
        return None
