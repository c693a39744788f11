"""Symbolic sizes: expressions over the open dimensions of a model's inputs.

A size is an integer, or a polynomial with rational coefficients over *terms*: symbols of the inputs, floors of
quotients, minima, and unknowns, which stand for sizes without a symbolic form. Sizes that compare equal are equal for
all inputs; the converse nearly always holds, because polynomials have a normal form. A size that is a number is the
same for all inputs: this is what "constant" means in shape inference.

Symbols are sizes of axes and are assumed to be at least one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from operator import index
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from cpd_onnx.ir.model import Array
from cpd_onnx.ops.evaluate import EVALUATORS, NOT_COMPUTED, Call, axes_operand
from cpd_onnx.ops.traits import traits

Number: TypeAlias = "int | Fraction"
"""A coefficient, or the value of a size under a binding."""
Extent: TypeAlias = "int | Size"
"""The size of an axis: an integer if it is the same for all inputs, else a `Size`."""
Extents: TypeAlias = "tuple[Extent, ...]"
"""The sizes of the axes of a tensor."""
Expressions: TypeAlias = npt.NDArray[Any]
"""An object array of numbers and `Size`s: the elements of a tensor of sizes."""
Monomial: TypeAlias = "tuple[tuple[Term, int], ...]"
"""A product of powers, as sorted (term, exponent) pairs; empty for the constant monomial."""

_MAX_DENOMINATOR = 1 << 10
"""Largest denominator of a float factor of a size. Heuristic: products with finer factors are rounded to float32, which
may cross the next integer."""
_UNBOUNDED = float(np.finfo(np.float32).max)
"""Bound of Clip that is none: the default of its attributes, in the ONNX specification."""
_MAX_MONOMIALS = 40
"""Largest number of monomials of a polynomial; longer ones become unknowns. Heuristic that bounds the time."""


@dataclass(frozen=True)
class Term:
    """An indivisible factor of a monomial.

    Attributes:
        kind: "symbol", "floor" (of a size over an integer), "quotient" (of two sizes), "min", or "unknown".
        arguments: Name of a symbol, operands of a floor, quotient or min, or unique key of an unknown.

    """

    kind: str
    arguments: tuple[Any, ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.arguments))

    def __hash__(self) -> int:
        """Return the cached hash: terms nest, so that computing it is expensive."""
        return self._hash

    @functools.cached_property
    def key(self) -> str:
        """Sort key of the term."""
        return f"{self.kind}({', '.join(map(str, self.arguments))})"

    def __str__(self) -> str:
        """Return the name of a symbol, or a readable expression; "?" for an unknown."""
        if self.kind == "symbol":
            return str(self.arguments[0])
        if self.kind in ("floor", "quotient"):
            return f"({self.arguments[0]})//({self.arguments[1]})"
        return "?" if self.kind == "unknown" else self.key


class Size:
    """A polynomial that is not a constant; created by `symbol`, `unknown` and arithmetic."""

    def __init__(self, coefficients: Mapping[Monomial, Number]) -> None:
        """Create a size from its nonzero coefficients by monomial."""
        self.coefficients = dict(coefficients)
        self._hash = hash(frozenset(self.coefficients.items()))

    def __hash__(self) -> int:
        """Return the hash of the polynomial."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Whether both are the same polynomial."""
        return isinstance(other, Size) and self._hash == other._hash and self.coefficients == other.coefficients

    @functools.cached_property
    def has_unknowns(self) -> bool:
        """Whether it contains an unknown term."""
        terms = [term for monomial in self.coefficients for term, _ in monomial]
        return any(t.kind == "unknown" or any(getattr(a, "has_unknowns", False) for a in t.arguments) for t in terms)

    @functools.cached_property
    def lower_bound(self) -> Number | None:
        """A number that it is at least for all inputs, from the bounds of its terms; None if none is known."""
        lowest: Number = 0
        for monomial, coefficient in self.coefficients.items():
            for term, power in monomial:
                bound = _lower_bound_of_term(term)
                if coefficient < 0 or bound is None or bound < 0:
                    return None
                coefficient *= bound**power
            lowest += coefficient
        return lowest

    @functools.cached_property
    def symbols(self) -> frozenset[str]:
        """Names of all symbols in it."""
        found: set[str] = set()
        for monomial in self.coefficients:
            for term, _ in monomial:
                inner = [argument.symbols for argument in term.arguments if isinstance(argument, Size)]
                found |= {str(term.arguments[0])} if term.kind == "symbol" else frozenset().union(*inner)
        return frozenset(found)

    def __add__(self, other: Any) -> Any:
        """Sum."""
        return _normalized(_summed(self, other))

    def __sub__(self, other: Any) -> Any:
        """Difference."""
        return _normalized(_summed(self, other, -1))

    def __rsub__(self, other: Any) -> Any:
        """Difference."""
        return _normalized(_summed(other, self, -1))

    def __mul__(self, other: Any) -> Any:
        """Product."""
        return _product(self, other)

    def __neg__(self) -> Any:
        """Negative."""
        return _product(self, -1)

    def __floordiv__(self, other: Any) -> Any:
        """Quotient, rounded down."""
        return floor_divided(self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        """Quotient, rounded down."""
        return floor_divided(other, self)

    def __mod__(self, other: Any) -> Any:
        """Remainder."""
        return self - other * floor_divided(self, other)

    def __rmod__(self, other: Any) -> Any:
        """Remainder."""
        return other - self * floor_divided(other, self)

    __radd__, __rmul__ = __add__, __mul__

    def __bool__(self) -> bool:
        """Raise TypeError: the truth value depends on the inputs."""
        raise TypeError(f"whether {self} is zero depends on the inputs")

    def __repr__(self) -> str:
        """Return the polynomial in the usual notation."""
        parts = []
        for monomial, coefficient in sorted(self.coefficients.items(), key=lambda item: _order(item[0]), reverse=True):
            factors = [str(term) if power == 1 else f"{term}^{power}" for term, power in monomial]
            parts.append("*".join([str(coefficient)] * (coefficient != 1 or not factors) + factors))
        return " + ".join(parts).replace("+ -", "- ")


def symbol(name: str) -> Size:
    """Return the size of an open dimension."""
    return Size({((Term("symbol", (name,)), 1),): 1})


def unknown(*key: Any) -> Size:
    """Return a size without a symbolic form; unknowns with the same key are the same number."""
    return Size({((Term("unknown", key), 1),): 1})


def as_size(value: Any) -> Any:
    """Return a value as the size of an axis; TypeError if it is neither an integer nor a `Size`."""
    return value if isinstance(value, Size) else index(value)


def is_constant(size: Any) -> bool:
    """Whether a size is a number, the same for all inputs."""
    return not isinstance(size, Size)


def _order(monomial: Monomial) -> tuple[int, tuple[tuple[str, int], ...]]:
    return (sum(power for _, power in monomial), tuple((term.key, power) for term, power in monomial))


def _coefficients(value: Any) -> Mapping[Monomial, Number]:
    if isinstance(value, Size):
        return value.coefficients
    number = _number(value)
    return {(): number} if number else {}


def _number(value: Any) -> Number:
    if isinstance(value, int | Fraction):
        return int(value) if isinstance(value, int) or value.denominator == 1 else value
    if isinstance(value, np.integer | np.bool_):
        return int(value)
    exact = Fraction(float(value))  # OverflowError, ValueError for infinities and NaN
    if exact.denominator > _MAX_DENOMINATOR:
        raise ValueError(f"products with {value} are rounded")
    return int(exact) if exact.denominator == 1 else exact


def _normalized(coefficients: Mapping[Monomial, Number]) -> Any:
    """Return the number or size with these coefficients, zeros dropped."""
    found = {m: _number(c) for m, c in coefficients.items() if c}
    if not found:
        return 0
    if len(found) == 1 and () in found:
        return found[()]
    if len(found) > _MAX_MONOMIALS:
        return unknown("long", hash(frozenset(found.items())))
    return Size(found)


def _summed(a: Any, b: Any, sign: int = 1) -> dict[Monomial, Number]:
    found = dict(_coefficients(a))
    for monomial, coefficient in _coefficients(b).items():
        found[monomial] = found.get(monomial, 0) + sign * coefficient
    return found


def _product(a: Any, b: Any) -> Any:
    found: dict[Monomial, Number] = {}
    for left, x in _coefficients(a).items():
        for right, y in _coefficients(b).items():
            monomial = _joined(left, right)
            found[monomial] = found.get(monomial, 0) + x * y
    return _normalized(found)


def _joined(left: Monomial, right: Monomial) -> Monomial:
    if not left or not right:
        return left or right
    powers = dict(left)
    for term, power in right:
        powers[term] = powers.get(term, 0) + power
    return tuple(sorted(powers.items(), key=lambda item: item[0].key))


def divided(a: Any, b: Any) -> Any:
    """Return the exact quotient of two sizes if it is a polynomial, None otherwise."""
    rest, divisor, quotient = dict(_coefficients(a)), _coefficients(b), dict[Monomial, Number]()
    if not divisor:
        return None
    lead = max(divisor, key=_order)
    for _ in range(_MAX_MONOMIALS):
        if not rest:
            return _normalized(quotient)
        top = max(rest, key=_order)
        monomial = _over(top, lead)
        if monomial is None:
            return None
        factor = Fraction(rest[top]) / Fraction(divisor[lead])
        quotient[monomial] = quotient.get(monomial, 0) + factor
        for other, coefficient in divisor.items():
            place = _joined(monomial, other)
            rest[place] = rest.get(place, 0) - factor * coefficient
            if not rest[place]:
                del rest[place]
    return None


def solved_quotient(size: Size, number: int) -> tuple[Size, int] | None:
    """Return the rest of a division of which a size is a multiple, and what it is where the size is a number.

    None if the size is not such a multiple. The rest may be that number for all valid inputs although its symbols do
    not show it.
    """
    (monomial, factor), *others = size.coefficients.items()
    if others or len(monomial) != 1 or monomial[0][1] != 1 or monomial[0][0].kind not in ("floor", "quotient"):
        return None
    found = Fraction(number) / Fraction(factor)
    return (Size({monomial: 1}), int(found)) if found.denominator == 1 else None


def _over(top: Monomial, lead: Monomial) -> Monomial | None:
    powers = dict(top)
    for term, power in lead:
        if powers.get(term, 0) < power:
            return None
        powers[term] -= power
    return tuple((term, power) for term, power in powers.items() if power)


def floor(value: Any) -> Any:
    """Return a value rounded down; integer parts are moved out of the floor."""
    if not isinstance(value, Size):
        return math.floor(value)
    below = math.lcm(*(Fraction(c).denominator for c in value.coefficients.values()))
    if below == 1:
        return value
    top = {m: int(c * below) for m, c in value.coefficients.items()}
    whole = _normalized({m: c // below for m, c in top.items()})
    rest = _normalized({m: c % below for m, c in top.items()})
    if not isinstance(rest, Size):
        return whole  # the remainder is less than one
    inner = [m[0][0] for m in rest.coefficients if len(m) == 1 and m[0][0].kind == "floor" and m[0][1] == 1]
    if len(inner) == 1 and rest.coefficients[((inner[0], 1),)] == 1:
        # floor((floor(p / q) + r) / s) = floor((p + q r) / (q s))
        size, under = inner[0].arguments
        others = rest - Size({((inner[0], 1),): 1})
        return whole + floor(_product(size + under * others, Fraction(1, under * below)))
    return whole + Size({((Term("floor", (rest, below)), 1),): 1})


def floor_divided(a: Any, b: Any) -> Any:
    """Return the quotient of two sizes, rounded down."""
    if not isinstance(b, Size):
        number = _number(b)
        if not number:
            raise ZeroDivisionError
        return floor(_product(a, Fraction(1) / number))
    exact = divided(a, b)
    return floor(exact) if exact is not None else Size({((Term("quotient", (a, b)), 1),): 1})


def least(a: Any, b: Any) -> Any:
    """Return the minimum of two sizes."""
    difference = _normalized(_summed(a, b, -1))
    if _is_at_least(difference, 0) or _is_minimum_with(b, a):
        return b
    if _is_at_least(_product(difference, -1), 0) or _is_minimum_with(a, b):
        return a
    pair = tuple(sorted((a, b), key=str))
    return Size({((Term("min", pair), 1),): 1})


def _is_minimum_with(a: Any, b: Any) -> bool:
    """Whether a size is the minimum of another one and something else."""
    if not isinstance(a, Size) or len(a.coefficients) != 1:
        return False
    (monomial, coefficient), *_ = a.coefficients.items()
    if coefficient != 1 or len(monomial) != 1 or monomial[0][1] != 1 or monomial[0][0].kind != "min":
        return False
    return any(argument == b or _is_minimum_with(argument, b) for argument in monomial[0][0].arguments)


def largest(a: Any, b: Any) -> Any:
    """Return the maximum of two sizes."""
    return _normalized(_summed(_normalized(_summed(a, b)), least(a, b), -1))


def is_equal(a: Any, b: Any) -> Any:
    """Return whether two sizes are equal; an unknown if it depends on the inputs."""
    difference = _normalized(_summed(a, b, -1))
    if not isinstance(difference, Size):
        return not difference
    if _is_at_least(difference, 1) or _is_at_least(_product(difference, -1), 1):
        return False
    return unknown("equal", difference)


def is_less(a: Any, b: Any) -> Any:
    """Return whether one size is less than another; an unknown if it depends on the inputs."""
    if _is_at_least(_normalized(_summed(b, a, -1)), 1):
        return True
    if _is_at_least(_normalized(_summed(a, b, -1)), 0):
        return False
    return unknown("less", a, b)


def _is_at_least(value: Any, bound: int) -> bool:
    """Whether a size is proved to be at least `bound` for all inputs."""
    lowest = _lower_bound(value)
    return lowest is not None and lowest >= bound


def _lower_bound(value: Any) -> Number | None:
    return value.lower_bound if isinstance(value, Size) else _number(value)


def _lower_bound_of_term(term: Term) -> Number | None:
    if term.kind == "symbol":
        return 1
    if term.kind == "unknown":
        return None
    first, second = map(_lower_bound, term.arguments)
    if first is None or second is None:
        return None
    if term.kind == "min":
        return min(first, second)
    if term.kind == "floor":
        below: int = term.arguments[1]
        return math.floor(Fraction(first) / below)
    return 0 if first >= 0 and second >= 1 else None


def product(sizes: Iterable[Any]) -> Any:
    """Return the product of sizes."""
    sizes = list(sizes)
    if all(isinstance(size, int) for size in sizes):
        return math.prod(sizes)
    found: Any = 1
    for size in sizes:
        found = _product(found, size)
    return found


@dataclass
class Bindings:
    """Numbers of symbols and unknowns under each binding.

    Attributes:
        numbers: Numbers of each symbol or unknown, one for each binding.

    """

    numbers: dict[Term, tuple[int, ...]] = field(default_factory=dict)
    _measured: dict[tuple[int, ...], Size] = field(default_factory=dict)
    _known: dict[tuple[Size, int], Number | None] = field(default_factory=dict)

    def bind(self, size: Size, numbers: tuple[int, ...]) -> Size:
        """Record the numbers of a symbol or unknown, unless it has some, and return it."""
        (monomial,) = size.coefficients
        self.numbers.setdefault(monomial[0][0], numbers)
        return size

    def at(self, size: Any, binding: int) -> Number | None:
        """Return the value of a size under a binding; None if it contains a term without a number."""
        if not isinstance(size, Size):
            return _number(size)
        if (size, binding) not in self._known:
            self._known[size, binding] = self._at(size, binding)
        return self._known[size, binding]

    def evaluates_to(self, size: Extent, numbers: tuple[int, ...]) -> bool:
        """Whether a size has these values under the bindings."""
        return all(self.at(size, binding) == number for binding, number in enumerate(numbers))

    def measure(self, place: tuple[Any, ...], numbers: tuple[int, ...], known: Iterable[Extent] = ()) -> Extent:
        """Return a size with the given values: one of `known` if it has them, else a constant, else an unknown.

        Equal values under all bindings make a constant unless a size in `known` has them too. Unknowns with the same
        values are the same size, since operators require sizes to match. `place` is the key of a new unknown.
        """
        alike = [size for size in known if self.evaluates_to(size, numbers)]
        if alike:
            return min(alike, key=lambda size: isinstance(size, Size) and size.has_unknowns)
        if len(set(numbers)) == 1:
            return numbers[0]
        if numbers not in self._measured:
            self._measured[numbers] = self.bind(unknown(*place), numbers)
        return self._measured[numbers]

    def _at(self, size: Size, binding: int) -> Number | None:
        total: Number = 0
        for monomial, coefficient in size.coefficients.items():
            for term, power in monomial:
                number = self._term(term, binding)
                if number is None:
                    return None
                coefficient = coefficient * number**power
            total += coefficient
        return total

    def _term(self, term: Term, binding: int) -> Number | None:
        if term in self.numbers:
            return self.numbers[term][binding]
        if term.kind in ("symbol", "unknown"):
            return None
        parts = [self.at(argument, binding) for argument in term.arguments]
        if None in parts:
            return None
        a, b = parts
        assert a is not None
        assert b is not None
        if term.kind == "min":
            return min(a, b)
        return math.floor(Fraction(a) / Fraction(b)) if b else None


# Operators on arrays of sizes.


def compute_sizes(op_type: str, call: Call, inputs: list[Expressions | None], is_open: list[bool]) -> list[Expressions]:
    """Return the outputs of a node on arrays of sizes; empty if the operator has no symbolic evaluation.

    `is_open` marks the inputs that contain symbolic sizes.
    """
    carried = traits(op_type).carried(len(inputs))
    try:
        if op_type in _SYMBOLIC:
            found = _SYMBOLIC[op_type](call, *inputs)
        elif not traits(op_type).moves_elements or any(
            here for slot, here in enumerate(is_open) if slot not in carried
        ):
            return []
        else:
            numbers = [a if slot in carried or a is None else _numbers(a) for slot, a in enumerate(inputs)]
            found = EVALUATORS[op_type](call, *numbers)
    except NOT_COMPUTED:
        return []
    return [_objects(f) for f in (found if isinstance(found, tuple) else (found,))]


def _numbers(array: Expressions) -> Array:
    """Return an operand without symbolic sizes as an int64 array."""
    return np.asarray(array.tolist(), np.int64).reshape(array.shape)


def objects(array: Array) -> Expressions:
    """Return an array of numbers as an object array."""
    found = np.empty(array.shape, object)
    found.reshape(-1)[:] = array.ravel().tolist()  # nested lists would lose the axes behind one of length 0
    return found


def _objects(found: Any) -> Expressions:
    is_done = isinstance(found, np.ndarray) and found.dtype == object
    return found if is_done else objects(np.asarray(found, object))


def _each(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda call, *arrays: np.frompyfunc(function, len(arrays), 1)(*arrays)


def _fold(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda call, *arrays: functools.reduce(np.frompyfunc(function, 2, 1), arrays)


def _quotient(call: Call, a: Expressions, b: Expressions) -> Any:
    """Return the quotient, rounded down if the call has the attribute `is_whole` (integer operands)."""
    if call.get("is_whole"):
        return np.frompyfunc(floor_divided, 2, 1)(a, b)
    return np.frompyfunc(_ratio, 2, 1)(a, b)


def _ratio(a: Any, b: Any) -> Any:
    exact = divided(a, b)
    if exact is None:
        raise NotImplementedError
    return exact


def _clipped(call: Call, array: Expressions, low: Expressions | None = None, high: Expressions | None = None) -> Any:
    """Return sizes between two bounds, which are operands, or attributes before opset 11."""
    for bound, name, function in ((low, "min", largest), (high, "max", least)):
        limit = call.get(name) if bound is None else bound.item()
        if limit is not None and not (isinstance(limit, float) and abs(limit) >= _UNBOUNDED):
            array = np.frompyfunc(function, 2, 1)(array, limit)
    return array


def _cast(call: Call, array: Expressions) -> Any:
    kind = call.get("to")
    if kind in (TensorProto.INT32, TensorProto.INT64):
        return np.frompyfunc(floor, 1, 1)(array)
    if kind in (TensorProto.FLOAT, TensorProto.DOUBLE):
        return array
    raise NotImplementedError


def _chosen(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, Size):
        return a if condition else b
    return a if a == b else unknown("where", condition, a, b)


def _negated(condition: Any) -> Any:
    return unknown("not", condition) if isinstance(condition, Size) else not condition


def _both(a: Any, b: Any) -> Any:
    if not isinstance(a, Size) or not isinstance(b, Size):
        known, other = (b, a) if isinstance(a, Size) else (a, b)
        return other if known else False
    return unknown("and", a, b)


def _any(a: Any, b: Any) -> Any:
    if not isinstance(a, Size) or not isinstance(b, Size):
        known, other = (b, a) if isinstance(a, Size) else (a, b)
        return True if known else other
    return unknown("or", a, b)


def _reduced(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def applied(call: Call, data: Expressions, *operands: Expressions | None) -> Any:
        axes = axes_operand(call, [None if o is None else _numbers(o) for o in operands])
        if not axes and call.get("noop_with_empty_axes", 0):
            return data
        chosen = range(data.ndim) if not axes else [axis % data.ndim for axis in axes]
        found = data
        for axis in sorted(chosen, reverse=True):
            found = _objects(np.frompyfunc(function, 2, 1).reduce(found, axis=axis))
            if call.get("keepdims", 1) == 1:
                found = np.expand_dims(found, axis)
        return found

    return applied


_SYMBOLIC: dict[str, Callable[..., Any]] = {  # evaluation of operators on arrays of sizes
    "Add": _each(lambda a, b: a + b), "Sub": _each(lambda a, b: a - b), "Mul": _each(lambda a, b: a * b),
    "Div": _quotient, "Mod": _each(lambda a, b: a % b), "Neg": _each(lambda a: -a), "Floor": _each(floor),
    "Ceil": _each(lambda a: -floor(-a)), "Cast": _cast, "Sum": _fold(lambda a, b: a + b), "Min": _fold(least),
    "Max": _fold(largest), "Clip": _clipped, "Equal": _each(is_equal), "Less": _each(is_less),
    "Greater": _each(lambda a, b: is_less(b, a)),
    "LessOrEqual": _each(lambda a, b: _negated(is_less(b, a))),
    "GreaterOrEqual": _each(lambda a, b: _negated(is_less(a, b))), "Not": _each(_negated), "And": _each(_both),
    "Or": _each(_any), "Where": _each(_chosen), "ReduceProd": _reduced(lambda a, b: a * b),
    "ReduceSum": _reduced(lambda a, b: a + b), "ReduceMin": _reduced(least), "ReduceMax": _reduced(largest),
}  # fmt: skip  # a table
