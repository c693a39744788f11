"""Shape arithmetic on the host, evaluated during the import into torch.

Exporters compute the operands of Reshape, Slice or Resize with chains of small integer tensors that start at a Shape.
Such a tensor is represented by a `Host`: a numpy array of Python numbers and, for sizes known only at run time, of fx
nodes that stand for one number each. Known elements are computed and rearranged by the shared evaluators
(`ops.evaluate`); for the others scalar arithmetic is emitted, so that the imported module computes its shapes from
`x.size(i)` with Python integers: no tensor is built, the GPU is not synchronised, and torch.compile handles ordinary
symbolic sizes.
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
"""A numpy array of any element type."""
Emit = Callable[[Callable[..., Any], tuple[Any, ...]], fx.Node]
"""A function that emits a call of a function on arguments into the fx graph and returns its node."""
Attributes = Mapping[str, Any]
"""Values of a node's attributes by name."""
Rule = Callable[[str, Emit, Sequence[Any], Call], "Host | list[Host]"]
"""A function that computes the outputs of an operator from its name, the emitter, the inputs and the call."""

MAX_HOST_ELEMENTS = 1024
"""Largest size, in elements, of a tensor that is treated as shape arithmetic; larger ones are data. Heuristic."""


class NotOnHostError(Exception):
    """Raised if a node cannot be computed on the host, for instance because a number is known only at run time."""


@dataclass(frozen=True)
class Host:
    """A small tensor held on the host during the import.

    Attributes:
        array: Elements; an object array if some are fx nodes.
        dtype: Element type of the tensor that it represents.
    """

    array: Array
    dtype: np.dtype[Any]

    @property
    def is_known(self) -> bool:
        """Whether all elements are numbers."""
        return self.array.dtype != object

    def scalars(self) -> tuple[Any, ...]:
        """Return the elements in row-major order, as Python numbers and fx nodes."""
        return tuple(self.array.reshape(-1).tolist())


def make(array: Array, dtype: np.dtype[Any]) -> Host:
    """Return a `Host` of an array, with plain numbers if no element is an fx node."""
    array = np.asarray(array)
    if array.dtype == object and any(isinstance(element, fx.Node) for element in array.reshape(-1).tolist()):
        return Host(array, dtype)
    return Host(array.astype(dtype), dtype)


def shape_of(sizes: Sequence[Any], attributes: Attributes) -> Host:
    """Return the output of a Shape node whose input has the given sizes (numbers or fx nodes)."""
    picked = list(sizes)[slice(attributes.get("start", 0), attributes.get("end"))]
    array = np.empty(len(picked), dtype=object)
    array[:] = picked
    return make(array, np.dtype(np.int64))


def element_count(emit: Emit, sizes: Sequence[Any]) -> Host:
    """Return the output of a Size node whose input has the given sizes (numbers or fx nodes)."""
    array = np.empty((), dtype=object)
    array[()] = functools.reduce(functools.partial(_apply, emit, operator.mul), sizes, 1)
    return make(array, np.dtype(np.int64))


# Scalar arithmetic: functions that the module calls for elements known only at run time.


def _apply(emit: Emit, function: Callable[..., Any], *arguments: Any) -> Any:
    if any(isinstance(argument, fx.Node) for argument in arguments):
        return emit(function, arguments)
    return function(*arguments)


def single(value: float) -> float:
    """Return a double rounded to the nearest float32 (Veltkamp's splitting), for numbers and symbolic floats.

    >>> single(0.1) == float(np.float32(0.1))
    True
    """
    scaled = value * (2.0**29 + 1.0)
    return scaled - (scaled - value)


def truncated_division(a: int, b: int) -> int:
    """Return the quotient of two integers rounded towards zero, as ONNX defines it.

    >>> truncated_division(-7, 2), truncated_division(7, 2)
    (-3, 3)
    """
    return a // b if (a >= 0) == (b > 0) else -(-a // b)


def divide(a: float, b: float) -> float:
    """Return the quotient of two numbers, rounded to float32."""
    return single(a / b)


def select(condition: bool, a: Any, b: Any) -> Any:
    """Return `a` if the condition holds, else `b`: Where on a single element."""
    return a if condition else b


def logical_and(a: bool, b: bool) -> bool:
    """Return the conjunction of two truth values."""
    return bool(a) and bool(b)


def logical_or(a: bool, b: bool) -> bool:
    """Return the disjunction of two truth values."""
    return bool(a) or bool(b)


def reciprocal(a: float) -> float:
    """Return the reciprocal of a number, rounded to float32."""
    return divide(1.0, a)


def single_add(a: float, b: float) -> float:
    """Return the sum of two numbers, rounded to float32."""
    return single(a + b)


def single_subtract(a: float, b: float) -> float:
    """Return the difference of two numbers, rounded to float32."""
    return single(a - b)


def single_multiply(a: float, b: float) -> float:
    """Return the product of two numbers, rounded to float32."""
    return single(a * b)


def single_root(a: float) -> float:
    """Return the square root of a number, rounded to float32."""
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
"""Scalar functions of elementwise operators: for integers and booleans, and for float32; None if there is none."""

_FOLDS: dict[str, Callable[..., Any]] = {
    "Min": torch.sym_min,
    "Max": torch.sym_max,
    "ReduceProd": operator.mul,
    "ReduceSum": operator.add,
    "ReduceMax": torch.sym_max,
    "ReduceMin": torch.sym_min,
}
"""Binary functions of reductions and variadic operators, applied successively to all elements."""


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
    """Rearrange elements, numbers and fx nodes alike; the operands that determine the arrangement must be known."""
    carried = traits(name).carried(len(inputs))
    arrays = [host.array if slot in carried else _known(host) for slot, host in enumerate(inputs)]
    found, dtype = EVALUATORS[name](call, *arrays), inputs[carried[0]].dtype
    return [make(part, dtype) for part in found] if isinstance(found, tuple) else make(found, dtype)


def _known(host: Host | None) -> Array | None:
    if host is None:
        return None
    if not host.is_known:
        raise NotOnHostError
    return host.array


# Rules by operator of the default domain.
_RULES: dict[str, Rule] = dict.fromkeys(operators_with("moves_elements"), _moved)
_RULES |= dict.fromkeys([*_SCALARS, *_FOLDS], _elementwise)
_RULES |= dict.fromkeys([name for name in _FOLDS if name.startswith("Reduce")], _reduce)
_RULES |= {"Cast": _cast, "Where": _where}

OPERATORS = _RULES.keys() | operators_with("fills_sizes")
"""Operators of the default domain that can be computed on the host during the import."""


def compute(name: str, emit: Emit, inputs: Sequence[Host | None], call: Call) -> list[Host]:
    """Return the outputs of a node whose operator is in `OPERATORS`.

    Raises:
        NotOnHostError: The node must be computed with tensors when the module runs.
    """
    try:
        if name not in _RULES or all(host is None or host.is_known for host in inputs):
            return _of_numbers(name, inputs, call)
        found = _RULES[name](name, emit, inputs, call)
    except NOT_COMPUTED as error:
        raise NotOnHostError from error
    return found if isinstance(found, list) else [found]


def _of_numbers(name: str, inputs: Sequence[Host | None], call: Call) -> list[Host]:
    with np.errstate(all="ignore"):  # a constant may be infinite by design, such as the log of a zero mask
        found = EVALUATORS[name](call, *map(_known, inputs))
    arrays = [np.asarray(part) for part in (found if isinstance(found, tuple) else (found,))]
    if name == "ConstantOfShape" and arrays[0].size > MAX_HOST_ELEMENTS:
        raise NotOnHostError
    return [Host(array, array.dtype) for array in arrays]
