"""Shape arithmetic done while importing.

Exporters compute the operands of Reshape, Slice or Resize with chains of small integer tensors that start at a Shape.
Such a tensor is held here as a `Host`: a numpy array of Python numbers and, where a size is known only when the module
runs, of fx nodes that stand for one number each. Rules move the elements with numpy and emit scalar arithmetic, so that
the imported module computes its shapes from `x.size(i)` with Python integers: no tensor is built, a GPU is never waited
for, and torch.compile sees ordinary symbolic sizes.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from cpd_onnx.torch.dtypes import numpy_dtype

Array = npt.NDArray[Any]
Emit = Callable[[Callable[..., Any], tuple[Any, ...]], fx.Node]
Attributes = Mapping[str, Any]
Rule = Callable[[Emit, Sequence[Any], Attributes], "Host | list[Host]"]

LARGEST = 1024
"""Elements above which a tensor is data, not a shape."""


class NotOnHostError(Exception):
    """The rule needs a number that is known only when the module runs."""


@dataclass(frozen=True)
class Host:
    """A small tensor known while importing.

    Attributes:
        array: its elements; of type object if some are fx nodes.
        dtype: the element type that it stands for.
    """

    array: Array
    dtype: np.dtype[Any]

    @property
    def known(self) -> bool:
        """Whether all elements are numbers."""
        return self.array.dtype != object

    def scalars(self) -> tuple[Any, ...]:
        """The elements in row-major order, as Python numbers and fx nodes."""
        return tuple(self.array.reshape(-1).tolist())


RULES: dict[str, Rule] = {}


def make(array: Array, dtype: np.dtype[Any]) -> Host:
    """Hold an array, as plain numbers if no element is an fx node."""
    array = np.asarray(array)
    if array.dtype == object and any(isinstance(element, fx.Node) for element in array.reshape(-1).tolist()):
        return Host(array, dtype)
    return Host(array.astype(dtype), dtype)


def shape_of(sizes: Sequence[Any], attributes: Attributes) -> Host:
    """Give the value of a Shape node whose input has these sizes (numbers or fx nodes)."""
    picked = list(sizes)[slice(attributes.get("start", 0), attributes.get("end"))]
    array = np.empty(len(picked), dtype=object)
    array[:] = picked
    return make(array, np.dtype(np.int64))


def number_of(emit: Emit, sizes: Sequence[Any]) -> Host:
    """Give the value of a Size node whose input has these sizes."""
    array = np.empty((), dtype=object)
    array[()] = functools.reduce(functools.partial(_apply, emit, operator.mul), sizes, 1)
    return make(array, np.dtype(np.int64))


# Data movement: the first input may hold fx nodes, the others must be known.


def _known(host: Host | None) -> Array | None:
    if host is None:
        return None
    if not host.known:
        raise NotOnHostError
    return host.array


def _moves(name: str) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Register a function on arrays that moves the elements of its first input."""

    def decorate(function: Callable[..., Array]) -> Callable[..., Array]:
        def rule(emit: Emit, inputs: Sequence[Any], attributes: Attributes) -> Host:
            data, *others = inputs
            return make(function(data.array, *map(_known, others), **attributes), data.dtype)

        RULES[name] = rule
        return function

    return decorate


@_moves("Gather")
def _gather(data: Array, indices: Array, *, axis: int = 0) -> Array:
    return np.take(data, indices, axis)


@_moves("Unsqueeze")
def _unsqueeze(data: Array, axes: Array | Sequence[int]) -> Array:
    return np.expand_dims(data, tuple(int(axis) for axis in np.reshape(axes, -1)))


@_moves("Squeeze")
def _squeeze(data: Array, axes: Array | Sequence[int] | None = None) -> Array:
    return np.squeeze(data, None if axes is None else tuple(int(axis) for axis in np.reshape(axes, -1)))


@_moves("Transpose")
def _transpose(data: Array, *, perm: Sequence[int] | None = None) -> Array:
    return np.transpose(data, perm)


@_moves("Reshape")
def _reshape(data: Array, shape: Array, *, allowzero: int = 0) -> Array:
    target = [data.shape[axis] if size == 0 and not allowzero else int(size) for axis, size in enumerate(shape)]
    return np.reshape(data, target)


@_moves("Expand")
def _expand(data: Array, shape: Array) -> Array:
    return np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(shape.tolist())))


@_moves("Tile")
def _tile(data: Array, repeats: Array) -> Array:
    return np.tile(data, repeats.tolist())


@_moves("Slice")
def _slice(
    data: Array,
    starts: Array | Sequence[int],
    ends: Array | Sequence[int],
    axes: Array | Sequence[int] | None = None,
    steps: Array | Sequence[int] | None = None,
) -> Array:
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    window: list[slice] = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        backwards_to_the_start = step < 0 and end < -data.shape[axis]
        window[axis] = slice(int(start), None if backwards_to_the_start else int(end), int(step))
    return data[tuple(window)]


@_moves("Identity")
def _identity(data: Array) -> Array:
    return data


def _concat(emit: Emit, inputs: Sequence[Host], attributes: Attributes) -> Host:
    return make(np.concatenate([host.array for host in inputs], attributes["axis"]), inputs[0].dtype)


def _split(emit: Emit, inputs: Sequence[Any], attributes: Attributes) -> list[Host]:
    data, axis = inputs[0], attributes.get("axis", 0)
    sizes = _known(inputs[1]) if len(inputs) > 1 else attributes.get("split")
    if sizes is None:
        raise NotOnHostError
    return [make(part, data.dtype) for part in np.split(data.array, np.cumsum(sizes)[:-1], axis)]


def _constant_of_shape(emit: Emit, inputs: Sequence[Any], attributes: Attributes) -> Host:
    value = attributes.get("value", np.zeros(1, np.float32))
    shape = _known(inputs[0])
    assert shape is not None
    if shape.prod() > LARGEST:
        raise NotOnHostError
    return make(np.full(shape.tolist(), value.reshape(-1)[0]), value.dtype)


def _range(emit: Emit, inputs: Sequence[Any], attributes: Attributes) -> Host:
    if not all(host.known for host in inputs):
        raise NotOnHostError
    start, limit, delta = (host.array.item() for host in inputs)
    return make(np.arange(start, limit, delta), inputs[0].dtype)


RULES |= {"Concat": _concat, "Split": _split, "ConstantOfShape": _constant_of_shape, "Range": _range}


# Scalar arithmetic: element by element, numbers at once, fx nodes by emitting a call.


def _apply(emit: Emit, function: Callable[..., Any], *arguments: Any) -> Any:
    if any(isinstance(argument, fx.Node) for argument in arguments):
        return emit(function, arguments)
    return function(*arguments)


def single(value: float) -> float:
    """Round a double to the nearest float32, with arithmetic that symbolic sizes allow too (Veltkamp's split).

    >>> single(0.1) == float(np.float32(0.1))
    True
    """
    scaled = value * (2.0**29 + 1.0)
    return scaled - (scaled - value)


def truncated_division(a: int, b: int) -> int:
    """Divide integers as ONNX does: towards zero.

    >>> truncated_division(-7, 2), truncated_division(7, 2)
    (-3, 3)
    """
    return a // b if (a >= 0) == (b > 0) else -(-a // b)


def divide(a: float, b: float) -> float:
    """Divide as float32 does."""
    return single(a / b)


def select(condition: bool, a: Any, b: Any) -> Any:
    """Pick one of two numbers: Where on a single element."""
    return a if condition else b


def logical_and(a: bool, b: bool) -> bool:
    """Conjunction of two truth values."""
    return bool(a) and bool(b)


def logical_or(a: bool, b: bool) -> bool:
    """Disjunction of two truth values."""
    return bool(a) or bool(b)


def single_add(a: float, b: float) -> float:
    """Add as float32 does."""
    return single(a + b)


def single_subtract(a: float, b: float) -> float:
    """Subtract as float32 does."""
    return single(a - b)


def single_multiply(a: float, b: float) -> float:
    """Multiply as float32 does."""
    return single(a * b)


def single_root(a: float) -> float:
    """Take the square root as float32 does."""
    return single(math.sqrt(a))


@dataclass(frozen=True)
class _Scalar:
    """One elementwise operator: on arrays of numbers, on a Python integer, and on a Python float."""

    arrays: Callable[..., Any]
    integers: Callable[..., Any] | None
    floats: Callable[..., Any] | None
    result: np.dtype[Any] | None = None


_BOOL = np.dtype(np.bool_)

_SCALARS = {
    "Add": _Scalar(np.add, operator.add, single_add),
    "Sub": _Scalar(np.subtract, operator.sub, single_subtract),
    "Mul": _Scalar(np.multiply, operator.mul, single_multiply),
    "Div": _Scalar(np.divide, truncated_division, divide),
    "Mod": _Scalar(np.mod, operator.mod, None),
    "Neg": _Scalar(np.negative, operator.neg, operator.neg),
    "Abs": _Scalar(np.abs, abs, abs),
    "Min": _Scalar(np.minimum, torch.sym_min, torch.sym_min),
    "Max": _Scalar(np.maximum, torch.sym_max, torch.sym_max),
    "Sqrt": _Scalar(np.sqrt, None, single_root),
    "Floor": _Scalar(np.floor, None, math.floor),
    "Ceil": _Scalar(np.ceil, None, math.ceil),
    "Equal": _Scalar(np.equal, operator.eq, operator.eq, _BOOL),
    "Less": _Scalar(np.less, operator.lt, operator.lt, _BOOL),
    "LessOrEqual": _Scalar(np.less_equal, operator.le, operator.le, _BOOL),
    "Greater": _Scalar(np.greater, operator.gt, operator.gt, _BOOL),
    "GreaterOrEqual": _Scalar(np.greater_equal, operator.ge, operator.ge, _BOOL),
    "And": _Scalar(np.logical_and, logical_and, None, _BOOL),
    "Or": _Scalar(np.logical_or, logical_or, None, _BOOL),
    "Not": _Scalar(np.logical_not, operator.not_, None, _BOOL),
}


def _elementwise(scalar: _Scalar, emit: Emit, inputs: Sequence[Host], attributes: Attributes) -> Host:
    if attributes:
        raise NotOnHostError
    dtype = inputs[0].dtype
    arrays = [host.array for host in inputs]
    if all(host.known for host in inputs):
        return make(_on_numbers(scalar, arrays), scalar.result or dtype)
    function = scalar.floats if dtype.kind == "f" else scalar.integers
    if function is None or dtype in (np.float16, np.float64):
        raise NotOnHostError
    result = np.frompyfunc(functools.partial(_apply, emit, function), len(arrays), 1)(*arrays)
    return make(result, scalar.result or dtype)


def _on_numbers(scalar: _Scalar, arrays: Sequence[Array]) -> Array:
    with np.errstate(all="ignore"):  # a constant may be infinite by design, such as the log of a zero mask
        if scalar.arrays is np.divide and arrays[0].dtype.kind in "iu":
            return np.asarray(np.trunc(arrays[0] / arrays[1]))
        return np.asarray(scalar.arrays(*arrays))


for _name, _scalar in _SCALARS.items():
    RULES[_name] = functools.partial(_elementwise, _scalar)


def _reciprocal(emit: Emit, inputs: Sequence[Host], attributes: Attributes) -> Host:
    one = make(np.ones((), inputs[0].dtype), inputs[0].dtype)
    return _elementwise(_SCALARS["Div"], emit, [one, inputs[0]], attributes)


def _where(emit: Emit, inputs: Sequence[Host], attributes: Attributes) -> Host:
    arrays = [host.array for host in inputs]
    result = np.frompyfunc(functools.partial(_apply, emit, select), 3, 1)(*arrays)
    return make(result, inputs[1].dtype)


def _cast(emit: Emit, inputs: Sequence[Host], attributes: Attributes) -> Host:
    (host,), target = inputs, numpy_dtype(attributes["to"])
    if host.known:
        return make(host.array, target)
    if target.kind == host.dtype.kind:
        return Host(host.array, target)
    casts = {"f": torch.sym_float, "i": torch.sym_int, "u": torch.sym_int}
    if target.kind not in casts or host.dtype.kind not in "iuf":
        raise NotOnHostError
    return make(np.frompyfunc(functools.partial(_apply, emit, casts[target.kind]), 1, 1)(host.array), target)


def _reduce(function: Callable[..., Any]) -> Rule:
    def rule(emit: Emit, inputs: Sequence[Any], attributes: Attributes) -> Host:
        data = inputs[0]
        axes = attributes.get("axes") if len(inputs) == 1 else _known(inputs[1])
        if data.array.ndim != 1 or data.dtype.kind != "i" or (axes is not None and len(axes) != 1):
            raise NotOnHostError
        array = np.empty([1] * attributes.get("keepdims", 1), dtype=object)
        array[...] = functools.reduce(functools.partial(_apply, emit, function), data.array.tolist())
        return make(array, data.dtype)

    return rule


RULES |= {
    "Reciprocal": _reciprocal,
    "Where": _where,
    "Cast": _cast,
    "ReduceProd": _reduce(operator.mul),
    "ReduceSum": _reduce(operator.add),
    "ReduceMax": _reduce(torch.sym_max),
    "ReduceMin": _reduce(torch.sym_min),
}
