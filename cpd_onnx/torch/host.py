"""Shape arithmetic done while importing.

Exporters compute the operands of Reshape, Slice or Resize with chains of small integer tensors that start at a Shape.
Such a tensor is held here as a `Host`: a numpy array of Python numbers and, where a size is known only when the module
runs, of fx nodes that stand for one number each. What is known is computed and moved by the evaluators that the whole
project shares (`ops.evaluate`); for the rest scalar arithmetic is emitted, so that
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

from cpd_onnx.ops.evaluate import EVALUATORS, NOT_COMPUTED, Call, axes_operand
from cpd_onnx.ops.traits import operators_with, traits
from cpd_onnx.torch.dtypes import numpy_dtype

Array = npt.NDArray[Any]
Emit = Callable[[Callable[..., Any], tuple[Any, ...]], fx.Node]
Attributes = Mapping[str, Any]
Rule = Callable[[str, Emit, Sequence[Any], Call], "Host | list[Host]"]

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


# Scalar arithmetic: what is called for an element that is known only when the module runs.


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


def reciprocal(a: float) -> float:
    """Divide one by a number as float32 does."""
    return divide(1.0, a)


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


_SCALARS: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any] | None]] = {
    "Add": (operator.add, single_add),
    "Sub": (operator.sub, single_subtract),
    "Mul": (operator.mul, single_multiply),
    "Div": (truncated_division, divide),
    "Mod": (operator.mod, None),
    "Neg": (operator.neg, operator.neg),
    "Abs": (abs, abs),
    "Sqrt": (None, single_root),
    "Reciprocal": (None, reciprocal),
    "Floor": (None, math.floor),
    "Ceil": (None, math.ceil),
    "Equal": (operator.eq, operator.eq),
    "Less": (operator.lt, operator.lt),
    "LessOrEqual": (operator.le, operator.le),
    "Greater": (operator.gt, operator.gt),
    "GreaterOrEqual": (operator.ge, operator.ge),
    "And": (logical_and, None),
    "Or": (logical_or, None),
    "Not": (operator.not_, None),
}
"""What is called for single elements: for integers and truth values, and for floats of 32 bits."""

_FOLDS: dict[str, Callable[..., Any]] = {
    "Min": torch.sym_min,
    "Max": torch.sym_max,
    "ReduceProd": operator.mul,
    "ReduceSum": operator.add,
    "ReduceMax": torch.sym_max,
    "ReduceMin": torch.sym_min,
}
"""What is called for two elements, and again for what comes of them and the next one."""


def _elementwise(name: str, emit: Emit, inputs: Sequence[Host], call: Call) -> Host:
    dtype = inputs[0].dtype
    function = _FOLDS[name] if name in _FOLDS else _SCALARS[name][dtype.kind == "f"]
    if function is None or call.attributes or dtype in (np.float16, np.float64):
        raise NotOnHostError
    arrays = [host.array for host in inputs]
    result = _each(emit, function, arrays) if name in _SCALARS else _folded(emit, function, arrays)
    return make(result, np.dtype(np.bool_) if traits(name).is_boolean else dtype)


def _each(emit: Emit, function: Callable[..., Any], arrays: Sequence[Array]) -> Array:
    return np.asarray(np.frompyfunc(functools.partial(_apply, emit, function), len(arrays), 1)(*arrays))


def _folded(emit: Emit, function: Callable[..., Any], arrays: Sequence[Array]) -> Array:
    return functools.reduce(lambda found, array: _each(emit, function, [found, array]), arrays)


def _where(name: str, emit: Emit, inputs: Sequence[Host], call: Call) -> Host:
    return make(_each(emit, select, [host.array for host in inputs]), inputs[1].dtype)


def _cast(name: str, emit: Emit, inputs: Sequence[Host], call: Call) -> Host:
    (host,), target = inputs, numpy_dtype(call.attributes["to"])
    if target.kind == host.dtype.kind:
        return Host(host.array, target)
    casts = {"f": torch.sym_float, "i": torch.sym_int, "u": torch.sym_int}
    if target.kind not in casts or host.dtype.kind not in "iuf":
        raise NotOnHostError
    return make(_each(emit, casts[target.kind], [host.array]), target)


def _reduce(name: str, emit: Emit, inputs: Sequence[Any], call: Call) -> Host:
    data, *operands = inputs
    axes = axes_operand(call, list(map(_known, operands)))
    is_whole = axes is None or len(axes) == 1
    if data.array.ndim != 1 or data.dtype.kind != "i" or not is_whole or call.get("noop_with_empty_axes", 0):
        raise NotOnHostError
    array = np.empty([1] * call.get("keepdims", 1), dtype=object)
    array[...] = functools.reduce(functools.partial(_apply, emit, _FOLDS[name]), data.array.tolist())
    return make(array, data.dtype)


def _moved(name: str, emit: Emit, inputs: Sequence[Any], call: Call) -> Host | list[Host]:
    """Move elements, whatever they are; where to must be known."""
    carried = traits(name).carried(len(inputs))
    arrays = [host.array if slot in carried else _known(host) for slot, host in enumerate(inputs)]
    found, dtype = EVALUATORS[name](call, *arrays), inputs[carried[0]].dtype
    return [make(part, dtype) for part in found] if isinstance(found, tuple) else make(found, dtype)


def _known(host: Host | None) -> Array | None:
    if host is None:
        return None
    if not host.known:
        raise NotOnHostError
    return host.array


_RULES: dict[str, Rule] = dict.fromkeys(operators_with("moves_elements"), _moved)
_RULES |= dict.fromkeys([*_SCALARS, *_FOLDS], _elementwise)
_RULES |= dict.fromkeys([name for name in _FOLDS if name.startswith("Reduce")], _reduce)
_RULES |= {"Cast": _cast, "Where": _where}

OPERATORS = _RULES.keys() | operators_with("fills_sizes")
"""Operators of the default domain that can be computed while importing."""


def compute(name: str, emit: Emit, inputs: Sequence[Host | None], call: Call) -> list[Host]:
    """Give the outputs of a node of one of `OPERATORS`.

    Raises:
        NotOnHostError: it has to be computed with tensors, when the module runs.
    """
    try:
        if name not in _RULES or all(host is None or host.known for host in inputs):
            return _of_numbers(name, inputs, call)
        found = _RULES[name](name, emit, inputs, call)
    except NOT_COMPUTED as error:
        raise NotOnHostError from error
    return found if isinstance(found, list) else [found]


def _of_numbers(name: str, inputs: Sequence[Host | None], call: Call) -> list[Host]:
    with np.errstate(all="ignore"):  # a constant may be infinite by design, such as the log of a zero mask
        found = EVALUATORS[name](call, *map(_known, inputs))
    made = [np.asarray(part) for part in (found if isinstance(found, tuple) else (found,))]
    if name == "ConstantOfShape" and made[0].size > LARGEST:
        raise NotOnHostError
    return [Host(array, array.dtype) for array in made]
