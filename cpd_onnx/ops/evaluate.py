"""Evaluation of shape arithmetic with numpy: the small integer tensors that exported graphs compute at run time.

An evaluator takes the node's attributes and opset (`Call`) and its input arrays, and returns the outputs. It is called
only if every input is known and small. Evaluators of operators that only *rearrange* elements (`Traits.moves_elements`)
work for any element type: applied to provenance records, they return the provenance of the result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

from cpd_onnx.ir.model import Array, element_type, to_array

Attributes: TypeAlias = dict[str, Any]
"""Values of a node's attributes by name."""
K = TypeVar("K")
V = TypeVar("V")
Evaluator: TypeAlias = Callable[..., "Array | tuple[Array, ...]"]
"""A function of a `Call` and the input arrays that returns the output, or a tuple of all outputs."""

MAX_ELEMENTS = 1 << 16
"""Largest number of elements of an evaluated tensor. Heuristic: far above real shape arithmetic, and small enough that
a malicious ConstantOfShape cannot exhaust memory."""


_MAX_COMPUTED = 1 << 20
"""Largest number of elements that an elementwise operator is evaluated for. Heuristic: they take a millisecond, and a
tensor of at most `MAX_ELEMENTS` at the first sizes may be larger at others."""


class TooLarge(Exception):
    """Raised if a result would have more elements than are evaluated."""


NOT_COMPUTED = (
    TooLarge, NotImplementedError, ValueError, LookupError, TypeError, ZeroDivisionError, OverflowError,
)  # fmt: skip  # a table
"""Exceptions that evaluators raise if an operator has no result for these inputs, or none that is supported here."""


@dataclass(frozen=True)
class Call:
    """A node without its inputs.

    Attributes:
        attributes: Values of the node's attributes by name.
        opset: Version of the default operator set.
        outputs: Number of outputs.

    """

    attributes: Attributes
    opset: int
    outputs: int = 1

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of an attribute, or the default if the node does not have it."""
        return self.attributes.get(name, default)


EVALUATORS: dict[str, Evaluator] = {}
"""Evaluators by operator of the default domain."""


def compute_outputs(op_type: str, call: Call, inputs: Sequence[Any]) -> tuple[Array, ...] | None:
    """Return the outputs of a node of the default domain; None if they cannot be computed here."""
    try:
        found = EVALUATORS[op_type](call, *inputs)
    except NOT_COMPUTED:
        return None
    return tuple(map(np.asarray, found)) if isinstance(found, tuple) else (np.asarray(found),)


def register_in(table: dict[K, V], *keys: K) -> Callable[[V], V]:
    """Return a decorator that registers a function in a table under the given keys."""

    def enter(function: V) -> V:
        assert not table.keys() & set(keys), keys
        table.update(dict.fromkeys(keys, function))
        return function

    return enter


evaluator = functools.partial(register_in, EVALUATORS)
"""Return a decorator that registers the evaluator of the given operators of the default domain."""


def _divide(a: Array, b: Array) -> Any:
    if not np.issubdtype(a.dtype, np.integer):
        return np.divide(a, b)
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)


_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _divide, "Neg": np.negative, "Abs": np.abs,
    "Equal": np.equal, "Less": np.less, "Greater": np.greater, "LessOrEqual": np.less_equal,
    "GreaterOrEqual": np.greater_equal, "Not": np.logical_not, "And": np.logical_and, "Or": np.logical_or,
    "Xor": np.logical_xor, "Floor": np.floor, "Ceil": np.ceil, "Sqrt": np.sqrt, "Sign": np.sign,
    "Reciprocal": lambda a: np.reciprocal(a), "Round": np.rint, "Exp": np.exp, "Log": np.log,
    "Identity": lambda a: a, "Where": np.where, "Pow": lambda base, power: np.power(base, power).astype(base.dtype),
    "CastLike": lambda array, like: array.astype(like.dtype), "Size": lambda array: np.int64(array.size),
    "NonZero": lambda array: np.asarray(np.nonzero(array), np.int64),
}  # fmt: skip  # one line an operator would be a page
"""Functions of operators with a fixed number of inputs and without attributes."""
_VARIADIC = {"Min": np.minimum, "Max": np.maximum, "Sum": np.add}
"""Binary functions of variadic operators."""


def _plain(function: Callable[..., Any]) -> Evaluator:
    def applied(call: Call, *arrays: Array) -> Array:
        if "axis" in call.attributes:  # until opset 6, that of the first operand's axes with which the second begins
            raise NotImplementedError
        _check_broadcast(arrays)
        return np.asarray(function(*arrays))

    return applied


def _repeated(function: Callable[..., Any]) -> Evaluator:
    def applied(call: Call, *arrays: Array) -> Array:
        _check_broadcast(arrays)
        return np.asarray(functools.reduce(function, arrays))

    return applied


def _check_broadcast(arrays: Sequence[Array]) -> None:
    if math.prod(np.broadcast_shapes(*map(np.shape, arrays))) > _MAX_COMPUTED:
        raise TooLarge


EVALUATORS |= {name: _plain(function) for name, function in _ELEMENTWISE.items()}
EVALUATORS |= {name: _repeated(function) for name, function in _VARIADIC.items()}
EVALUATORS |= {
    "Mod": lambda call, a, b: np.asarray(np.fmod(a, b) if call.get("fmod", 0) else np.mod(a, b)),
    "Cast": lambda call, array: array.astype(element_type(call.get("to"))),
    "Concat": lambda call, *arrays: np.concatenate(arrays, axis=call.get("axis", 1)),
    "Gather": lambda call, data, indices: np.take(data, indices, axis=call.get("axis", 0)),
    "Transpose": lambda call, data: np.transpose(data, call.get("perm")),
    "Unsqueeze": lambda call, data, *operands: np.expand_dims(data, tuple(axes_operand(call, operands) or ())),
}


@evaluator("Clip")
def _clip(call: Call, array: Array, low: Array | None = None, high: Array | None = None) -> Array:
    for limit, name, function in ((low, "min", np.maximum), (high, "max", np.minimum)):
        bound = call.get(name) if limit is None else limit
        array = array if bound is None else function(array, np.asarray(bound, array.dtype))
    return array


@evaluator("QuantizeLinear")
def _quantize(call: Call, array: Array, scale: Array, zero: Array | None = None) -> Array:
    dtype = np.dtype(np.uint8) if zero is None else zero.dtype
    if dtype.kind not in "iu" or (zero is None and call.get("output_dtype", 0)):
        raise NotImplementedError
    limits = np.iinfo(dtype)
    whole = np.rint(array / _spread(call, array, scale)) + (0 if zero is None else _spread(call, array, zero))
    return np.clip(whole, limits.min, limits.max).astype(dtype)


@evaluator("DequantizeLinear")
def _dequantize(call: Call, array: Array, scale: Array, zero: Array | None = None) -> Array:
    whole = array.astype(scale.dtype)
    if zero is not None:
        whole = whole - _spread(call, array, zero).astype(scale.dtype)
    return np.asarray(whole * _spread(call, array, scale))


def _spread(call: Call, array: Array, numbers: Array) -> Array:
    """Return scales or zero points in a shape that broadcasts to a quantised array."""
    if numbers.size == 1:
        return numbers.reshape(())
    axis = call.get("axis", 1)
    if numbers.ndim != 1 or array.shape[axis] != numbers.size:
        raise NotImplementedError
    shape = [1] * array.ndim
    shape[axis] = numbers.size
    return numbers.reshape(shape)


@evaluator("Slice")
def _slice(call: Call, data: Array, *operands: Array | None) -> Array:
    index: list[slice] = [slice(None)] * data.ndim
    for axis, start, end, step in slice_ranges(call, data.ndim, list(operands)):
        index[axis] = slice(start, end if end > -(2**62) else None, step)
    return data[tuple(index)]


def slice_ranges(call: Call, rank: int, operands: Sequence[Array | None]) -> list[tuple[int, int, int, int]]:
    """Return (axis, start, end, step) of each sliced axis, starts and ends as written in the file.

    `operands` are the inputs after the data; before opset 10 the attributes are used instead.
    """
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


def sliced_axes(
    rank: int, shapes: Sequence[Sequence[int] | None], values: Sequence[Array | None]
) -> frozenset[int] | None:
    """Return the axes that a Slice cuts by ranges that are not known; None if the axes are not known either.

    `shapes` and `values` are those of the inputs after the data.
    """
    if len(shapes) > 2 and shapes[2] is not None:
        return None if values[2] is None else frozenset(int(axis) % rank for axis in values[2].tolist())
    return frozenset(range(shapes[0][0])) if shapes[0] else None


def axes_operand(call: Call, operands: Sequence[Array | None]) -> list[int] | None:
    """Return the axes given as the first operand (newer opsets) or as an attribute; None if absent."""
    if operands and operands[0] is not None:
        return [int(a) for a in np.ravel(operands[0])]
    axes = call.get("axes")
    return None if axes is None else list(axes)


@evaluator("Squeeze")
def _squeeze(call: Call, data: Array, *operands: Array | None) -> Array:
    axes = axes_operand(call, operands)
    return np.squeeze(data, axis=None if axes is None else tuple(axes))


@evaluator("Reshape")
def _reshape(call: Call, data: Array, shape: Array | None = None) -> Array:
    target = call.get("shape") if shape is None else shape.tolist()
    if not call.get("allowzero", 0):
        target = [data.shape[i] if size == 0 else size for i, size in enumerate(target)]
    return data.reshape(target)


@evaluator("Flatten")
def _flatten(call: Call, data: Array) -> Array:
    axis = flattened_from(call, data.ndim)
    return data.reshape(math.prod(data.shape[:axis]), math.prod(data.shape[axis:]))


def flattened_from(call: Call, rank: int) -> int:
    """Return the first axis of the second part of Flatten: up to the rank itself; negative ones count from it."""
    axis = int(call.get("axis", 1))
    return axis + rank if axis < 0 else axis


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
        count = call.get("num_outputs", call.outputs)
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


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceProd": np.prod, "ReduceSum": np.sum, "ReduceMax": np.max, "ReduceMin": np.min, "ReduceMean": np.mean,
}  # fmt: skip  # as above
"""Functions of reductions over axes."""
EVALUATORS |= {name: _reduction(function) for name, function in _REDUCTIONS.items()}


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


def _check_size(shape: Sequence[int]) -> None:
    if min(shape, default=0) < 0 or math.prod(shape) > MAX_ELEMENTS:
        raise TooLarge
