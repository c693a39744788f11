"""Sequences of tensors during shape inference: the elements of those whose number of elements is known.

Exporters write them for lists of tensors that a model splits, appends to, picks from and joins. A sequence that a loop
grows, or that is an input of the graph, has unknown elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from onnx import NodeProto, TensorProto

from cpd_onnx.ops.evaluate import NOT_COMPUTED, Call, register_in
from cpd_onnx.ops.matrix_view import key_of
from cpd_onnx.ops.shapes_standard import joined
from cpd_onnx.shapes.bodies import renamed
from cpd_onnx.shapes.values import BINDINGS, Shape, Value, for_all_bindings

Inputs: TypeAlias = "Sequence[Value | None]"
"""The inputs of a node; None for an optional input that is absent."""
_MAX_PIECES = 1 << 10
"""Largest number of pieces of a split that are followed one by one. Heuristic, far above what models split into."""
_FUNCTIONS: dict[tuple[str, str], Callable[[str, Call, Inputs], Value | None]] = {}
"""Functions from the name of the output, the call and the inputs of a node to its output, by (domain, operator); they
return None if elements are unknown."""


def _sequences(name: str) -> Callable[[Callable[[str, Call, Inputs], Value | None]], Callable[..., Value | None]]:
    return register_in(_FUNCTIONS, ("", name))


def sequence_outputs(node: NodeProto, call: Call, inputs: Inputs) -> list[Value] | None:
    """Return the output of an operator that makes or takes a sequence; None for others and if elements are unknown."""
    function = _FUNCTIONS.get(key_of(node))
    if function is None:
        return None
    try:
        found = function(node.output[0], call, inputs)
    except NOT_COMPUTED:
        return None
    return None if found is None else [found]


def _of(name: str, elements: Sequence[Value]) -> Value:
    """Return a sequence."""
    return Value(name, elements=tuple(elements), from_shape=any(value.from_shape for value in elements))


def _elements(value: Value | None) -> tuple[Value, ...]:
    if value is None or value.elements is None:
        raise NotImplementedError
    return value.elements


def _position(inputs: Inputs, slot: int, default: int) -> int:
    """Return an operand that is a position."""
    value = inputs[slot] if slot < len(inputs) else None
    if value is None:
        return default
    if not value.is_static or value.value is None:
        raise NotImplementedError
    return int(value.value.item())


@_sequences("SequenceConstruct")
def _construct(name: str, call: Call, inputs: Inputs) -> Value | None:
    given = [value for value in inputs if value is not None]
    return None if any(value.shapes is None for value in given) else _of(name, given)


@_sequences("SequenceEmpty")
def _empty(name: str, call: Call, inputs: Inputs) -> Value:
    return _of(name, ())


@_sequences("SequenceInsert")
def _insert(name: str, call: Call, inputs: Inputs) -> Value | None:
    elements, added = _elements(inputs[0]), inputs[1]
    place = _position(inputs, 2, len(elements))
    return None if added is None or added.shapes is None else _of(name, [*elements[:place], added, *elements[place:]])


@_sequences("SequenceErase")
def _erase(name: str, call: Call, inputs: Inputs) -> Value:
    elements = _elements(inputs[0])
    place = _position(inputs, 1, -1) % len(elements)
    return _of(name, [*elements[:place], *elements[place + 1 :]])


@_sequences("SequenceAt")
def _at(name: str, call: Call, inputs: Inputs) -> Value:
    return renamed(_elements(inputs[0])[_position(inputs, 1, 0)], name)


@_sequences("SequenceLength")
def _length(name: str, call: Call, inputs: Inputs) -> Value:
    count = np.asarray(len(_elements(inputs[0])), np.int64)
    return Value(name, TensorProto.INT64, for_all_bindings(()), values=for_all_bindings(count))


@_sequences("ConcatFromSequence")
def _concat(name: str, call: Call, inputs: Inputs) -> Value | None:
    elements, axis = _elements(inputs[0]), call.get("axis")
    shapes = [[(value.shapes or ())[binding] for value in elements] for binding in BINDINGS]
    is_new = bool(call.get("new_axis", 0))
    if any(len({shape if is_new else _without(shape, axis) for shape in each}) != 1 for each in shapes):
        return None
    result = Value(name, elements[0].dtype, tuple(_joined(each, axis, is_new=is_new) for each in shapes))
    result.set_sizes(_joined([value.sizes or () for value in elements], axis, is_new=is_new))
    result.has_placeholder = any(value.has_placeholder for value in elements)
    result.from_shape = any(value.from_shape for value in elements)
    if all(value.is_static for value in elements):
        arrays = [value.value for value in elements if value.value is not None]
        result.values = for_all_bindings(np.stack(arrays, axis) if is_new else np.concatenate(arrays, axis))
    return result


def _joined(shapes: Sequence[tuple[Any, ...]], axis: int, *, is_new: bool) -> tuple[Any, ...]:
    """Return the shape of tensors that are concatenated along an axis, or stacked along a new one."""
    if not is_new:
        return joined(shapes, axis)
    sizes = list(shapes[0])
    sizes.insert(axis % (len(sizes) + 1), len(shapes))
    return tuple(sizes)


def _without(shape: Shape, axis: int) -> Shape:
    axis %= len(shape)
    return (*shape[:axis], *shape[axis + 1 :])


@_sequences("SplitToSequence")
def _split(name: str, call: Call, inputs: Inputs) -> Value | None:
    x = inputs[0]
    if x is None or x.shapes is None:
        return None
    axis, operand = call.get("axis", 0) % len(x.shapes[0]), inputs[1] if len(inputs) > 1 else None
    if not x.has_fixed(axis) or (operand is not None and not operand.is_static):
        return None
    size = x.shapes[0][axis]
    if operand is None or operand.value is None:
        sizes = [1] * size if size <= _MAX_PIECES else []
    elif operand.value.ndim:
        sizes = operand.value.tolist()
    else:
        chunk = int(operand.value)
        sizes = [min(chunk, size - start) for start in range(0, size, chunk)] if size <= _MAX_PIECES * chunk else []
    if sum(sizes) != size or min(sizes, default=0) < 1:
        return None
    is_dropped = operand is None and not call.get("keepdims", 1)
    return _of(name, [_piece(x, axis, size, f"{name}:{i}", is_dropped=is_dropped) for i, size in enumerate(sizes)])


def _piece(x: Value, axis: int, size: int, name: str, *, is_dropped: bool) -> Value:
    """Return a piece of a tensor along an axis of fixed size, without this axis if it is dropped."""

    def cut(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*sizes[:axis], *(() if is_dropped else (size,)), *sizes[axis + 1 :])

    piece = Value(name, x.dtype, tuple(map(cut, x.shapes or ())), has_placeholder=x.has_placeholder)
    if x.extents is not None:
        piece.set_sizes(cut(x.extents))
    return piece
