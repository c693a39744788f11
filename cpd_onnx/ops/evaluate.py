"""Shape arithmetic: the small integer tensors that exporters compute at run time, computed here with numpy.

Each evaluator takes the node's attributes and opset and its input arrays and gives the outputs. It is called only
where every input is known and small. Evaluators of operators that only *move* elements (`Traits.moves_elements`) work
on anything that stands for an element: run on where elements come from, they tell where those of the result come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias, cast

import numpy as np

from cpd_onnx.ir.model import Array, element_type, to_array

Attributes: TypeAlias = dict[str, Any]
Evaluator: TypeAlias = Callable[..., "Array | tuple[Array, ...]"]

MAX_ELEMENTS = 1 << 16
"""Results with more elements than this are not computed; a hostile ConstantOfShape asks for terabytes."""


class TooLarge(Exception):
    """The result would have more than `MAX_ELEMENTS` elements."""


NOT_COMPUTED = (
    TooLarge, NotImplementedError, ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError,
)  # fmt: skip  # a table
"""What evaluators raise where an operator has no result, or none that is computed here."""


@dataclass(frozen=True)
class Call:
    """What an evaluator may know of its node."""

    attributes: Attributes
    opset: int

    def get(self, name: str, default: Any = None) -> Any:
        """Attribute value or the default."""
        return self.attributes.get(name, default)


EVALUATORS: dict[str, Evaluator] = {}


def evaluator(*names: str) -> Callable[[Evaluator], Evaluator]:
    """Register the evaluator of some operators of the default domain."""

    def register(function: Evaluator) -> Evaluator:
        for name in names:
            assert name not in EVALUATORS, name
            EVALUATORS[name] = function
        return function

    return register


def _elementwise(function: Callable[..., Any]) -> Evaluator:
    def applied(call: Call, *arrays: Array) -> Array:
        if "axis" in call.attributes:  # until opset 6, that of the first operand's axes with which the second begins
            raise NotImplementedError
        return np.asarray(function(*arrays))

    return applied


def _divide(a: Array, b: Array) -> Any:
    if not np.issubdtype(a.dtype, np.integer):
        return np.divide(a, b)
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)


for _name, _function in {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _divide, "Neg": np.negative, "Abs": np.abs,
    "Equal": np.equal, "Less": np.less, "Greater": np.greater, "LessOrEqual": np.less_equal,
    "GreaterOrEqual": np.greater_equal, "Not": np.logical_not, "And": np.logical_and, "Or": np.logical_or,
    "Xor": np.logical_xor, "Floor": np.floor, "Ceil": np.ceil, "Sqrt": np.sqrt, "Sign": np.sign,
    "Reciprocal": lambda a: np.reciprocal(a), "Round": np.rint, "Exp": np.exp, "Log": np.log,
    "Identity": lambda a: a, "Where": np.where,
}.items():  # fmt: skip  # one line an operator would be a page
    evaluator(_name)(_elementwise(cast(Any, _function)))


@evaluator("Pow")
def _power(call: Call, base: Array, exponent: Array) -> Array:
    return np.power(base, exponent).astype(base.dtype)


@evaluator("Mod")
def _mod(call: Call, a: Array, b: Array) -> Array:
    return np.asarray(np.fmod(a, b) if call.get("fmod", 0) else np.mod(a, b))


def _variadic(function: Callable[[Any, Any], Any]) -> Evaluator:
    return lambda call, *arrays: np.asarray(reduce(function, arrays))


for _name, _function in {"Min": np.minimum, "Max": np.maximum, "Sum": np.add}.items():
    evaluator(_name)(_variadic(_function))


@evaluator("Cast")
def _cast(call: Call, array: Array) -> Array:
    return array.astype(element_type(call.get("to")))


@evaluator("CastLike")
def _cast_like(call: Call, array: Array, like: Array) -> Array:
    return array.astype(like.dtype)


@evaluator("Concat")
def _concat(call: Call, *arrays: Array) -> Array:
    return np.concatenate(arrays, axis=call.get("axis", 1))


@evaluator("Gather")
def _gather(call: Call, data: Array, indices: Array) -> Array:
    return np.take(data, indices, axis=call.get("axis", 0))


@evaluator("Size")
def _size(call: Call, array: Array) -> Array:
    return np.asarray(array.size, np.int64)


@evaluator("Slice")
def _slice(call: Call, data: Array, *operands: Array | None) -> Array:
    index: list[slice] = [slice(None)] * data.ndim
    for axis, start, end, step in slice_ranges(call, data.ndim, list(operands)):
        index[axis] = slice(start, end if end > -(2**62) else None, step)
    return data[tuple(index)]


def slice_ranges(call: Call, rank: int, operands: Sequence[Array | None]) -> list[tuple[int, int, int, int]]:
    """(axis, start, end, step) of each sliced axis, as written; opset below 10 has them as attributes."""
    if call.opset < 10:
        starts, ends = call.get("starts"), call.get("ends")
        axes, steps = call.get("axes"), None
    else:
        padded = [*operands, None, None, None, None]
        starts, ends = padded[0].tolist(), padded[1].tolist()  # type: ignore[union-attr]  # the schema requires both
        axes, steps = (None if o is None else o.tolist() for o in padded[2:4])
    axes = axes if axes is not None else list(range(len(starts)))
    steps = steps if steps is not None else [1] * len(starts)
    return [(axis % rank, start, end, step) for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)]


def axes_operand(call: Call, operands: Sequence[Array | None]) -> list[int] | None:
    """Axes given as an input (newer opsets) or an attribute, or None if absent."""
    if operands and operands[0] is not None:
        return [int(a) for a in np.ravel(operands[0])]
    axes = call.get("axes")
    return None if axes is None else list(axes)


@evaluator("Squeeze")
def _squeeze(call: Call, data: Array, *operands: Array | None) -> Array:
    axes = axes_operand(call, operands)
    return np.squeeze(data, axis=None if axes is None else tuple(axes))


@evaluator("Unsqueeze")
def _unsqueeze(call: Call, data: Array, *operands: Array | None) -> Array:
    return np.expand_dims(data, tuple(axes_operand(call, operands) or ()))


@evaluator("Reshape")
def _reshape(call: Call, data: Array, shape: Array | None = None) -> Array:
    target = call.get("shape") if shape is None else shape.tolist()
    if not call.get("allowzero", 0):
        target = [data.shape[i] if size == 0 else size for i, size in enumerate(target)]
    return data.reshape(target)


@evaluator("Flatten")
def _flatten(call: Call, data: Array) -> Array:
    axis = call.get("axis", 1) % (data.ndim + 1)
    return data.reshape(math.prod(data.shape[:axis]), -1)


@evaluator("Transpose")
def _transpose(call: Call, data: Array) -> Array:
    return np.transpose(data, call.get("perm"))


@evaluator("Expand")
def _expand(call: Call, data: Array, shape: Array) -> Array:
    target = np.broadcast_shapes(data.shape, tuple(shape.tolist()))
    _check_size(target)
    return np.broadcast_to(data, target)


@evaluator("Tile")
def _tile(call: Call, data: Array, repeats: Array) -> Array:
    _check_size([d * r for d, r in zip(data.shape, repeats.tolist(), strict=True)])
    return np.tile(data, repeats)


@evaluator("Split")
def _split(call: Call, data: Array, sizes: Array | None = None) -> tuple[Array, ...]:
    axis = call.get("axis", 0)
    parts = call.get("split") if sizes is None else sizes.tolist()
    if parts is None:
        count = call.get("num_outputs", 1)
        chunk = -(-data.shape[axis] // count)
        parts = [min(chunk, data.shape[axis] - i * chunk) for i in range(count)]
    return tuple(np.split(data, np.cumsum(parts)[:-1], axis=axis))


@evaluator("ConstantOfShape")
def _constant_of_shape(call: Call, shape: Array) -> Array:
    _check_size(shape.tolist())
    value = call.get("value")
    filling = np.zeros(1, np.float32) if value is None else value
    filling = filling if isinstance(filling, np.ndarray) else to_array(filling)
    return np.full(shape.tolist(), filling.ravel()[0], filling.dtype)


@evaluator("Range")
def _range(call: Call, start: Array, limit: Array, delta: Array) -> Array:
    _check_size([max(0, math.ceil((limit.item() - start.item()) / delta.item()))])
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@evaluator("CumSum")
def _cumsum(call: Call, data: Array, axis: Array) -> Array:
    if call.get("exclusive", 0) or call.get("reverse", 0):
        raise NotImplementedError
    return np.cumsum(data, axis=int(axis.item()), dtype=data.dtype)


@evaluator("ScatterND")
def _scatter_nd(call: Call, data: Array, indices: Array, updates: Array) -> Array:
    result = data.copy()
    result[tuple(np.moveaxis(indices, -1, 0))] = updates
    return result


@evaluator("GatherND")
def _gather_nd(call: Call, data: Array, indices: Array) -> Array:
    if call.get("batch_dims", 0):
        raise NotImplementedError
    return np.asarray(data[tuple(np.moveaxis(indices, -1, 0))])


def _reduction(function: Callable[..., Any]) -> Evaluator:
    def reduced(call: Call, data: Array, *operands: Array | None) -> Array:
        axes = axes_operand(call, operands)
        if not axes and call.get("noop_with_empty_axes", 0):
            return data
        result = function(data, axis=tuple(axes) if axes else None, keepdims=call.get("keepdims", 1) == 1)
        return np.asarray(result).astype(data.dtype)

    return reduced


for _name, _function in {
    "ReduceProd": np.prod, "ReduceSum": np.sum, "ReduceMax": np.max, "ReduceMin": np.min, "ReduceMean": np.mean,
}.items():  # fmt: skip  # as above
    evaluator(_name)(_reduction(cast(Any, _function)))


@evaluator("Trilu")
def _trilu(call: Call, data: Array, k: Array | None = None) -> Array:
    offset = 0 if k is None else int(k.item())
    return np.triu(data, offset) if call.get("upper", 1) else np.tril(data, offset)


@evaluator("OneHot")
def _one_hot(call: Call, indices: Array, depth: Array, values: Array) -> Array:
    count = int(depth.item())
    _check_size([*indices.shape, count])
    hot = np.equal(np.mod(indices[..., None], count), np.arange(count))
    return np.moveaxis(np.where(hot, values[1], values[0]), -1, call.get("axis", -1))


@evaluator("NonZero")
def _non_zero(call: Call, data: Array) -> Array:
    return np.asarray(np.nonzero(data), np.int64)


def _check_size(shape: Sequence[int]) -> None:
    if min(shape, default=0) < 0 or math.prod(shape) > MAX_ELEMENTS:
        raise TooLarge
