"""Sizes that depend on what a model is fed, as expressions over its open dimensions.

A size is a whole number, or a polynomial with rational coefficients over *terms*: the symbols of the inputs, floors of
quotients, minima, and unknowns for what cannot be written down. Normal forms are unique enough that two sizes which are
equal for all inputs nearly always compare equal; two which compare equal always are. What is a number here is a number
whatever the model is fed: this is what `fold` means by "constant".

Symbols are sizes of axes, so they are taken to be at least one.
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
Extent: TypeAlias = "int | Size"
"""The size of an axis: a whole number where it is the same for all inputs."""
Extents: TypeAlias = "tuple[Extent, ...]"
Expressions: TypeAlias = npt.NDArray[Any]
"""An array of objects: numbers and sizes."""
Monomial: TypeAlias = "tuple[tuple[Term, int], ...]"

_FINEST = 1 << 10
"""Floats with a larger denominator are no factors of sizes: their products are rounded to float32, which may go over
the next whole number."""
_MOST_MONOMIALS = 40
"""Longer polynomials become unknowns, so that odd graphs take no time without end."""


@dataclass(frozen=True)
class Term:
    """What polynomials are made of.

    Attributes:
        kind: "symbol", "floor" (of a size over a whole number), "quotient" (of two sizes), "min", or "unknown".
        arguments: the symbol's name, the sizes that it is made of, or what tells an unknown from others.

    """

    kind: str
    arguments: tuple[Any, ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.arguments))

    def __hash__(self) -> int:
        """Computed once: terms nest."""
        return self._hash

    @functools.cached_property
    def key(self) -> str:
        """What terms are ordered by."""
        return f"{self.kind}({', '.join(map(str, self.arguments))})"

    def __str__(self) -> str:
        """As in the file for a symbol."""
        if self.kind == "symbol":
            return str(self.arguments[0])
        if self.kind in ("floor", "quotient"):
            return f"({self.arguments[0]})//({self.arguments[1]})"
        return "?" if self.kind == "unknown" else self.key


class Size:
    """A polynomial that is no constant; made by `symbol`, `unknown` and arithmetic."""

    def __init__(self, coefficients: Mapping[Monomial, Number]) -> None:
        """Take coefficients by monomial, none of them zero."""
        self.coefficients = dict(coefficients)
        self._hash = hash(frozenset(self.coefficients.items()))

    def __hash__(self) -> int:
        """That of the polynomial."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Whether both are the same polynomial."""
        return isinstance(other, Size) and self._hash == other._hash and self.coefficients == other.coefficients

    @functools.cached_property
    def is_unsaid(self) -> bool:
        """Whether it holds an unknown."""
        terms = [term for monomial in self.coefficients for term, _ in monomial]
        return any(t.kind == "unknown" or any(getattr(a, "is_unsaid", False) for a in t.arguments) for t in terms)

    def __add__(self, other: Any) -> Any:
        """Sum."""
        return _made(_summed(self, other))

    def __sub__(self, other: Any) -> Any:
        """Difference."""
        return _made(_summed(self, other, -1))

    def __rsub__(self, other: Any) -> Any:
        """Difference."""
        return _made(_summed(other, self, -1))

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
        """Not known: whoever asks cannot go on."""
        raise TypeError(f"whether {self} is zero depends on the inputs")

    def __repr__(self) -> str:
        """As one writes it."""
        parts = []
        for monomial, coefficient in sorted(self.coefficients.items(), key=lambda item: _order(item[0]), reverse=True):
            factors = [str(term) if power == 1 else f"{term}^{power}" for term, power in monomial]
            parts.append("*".join([str(coefficient)] * (coefficient != 1 or not factors) + factors))
        return " + ".join(parts).replace("+ -", "- ")


def symbol(name: str) -> Size:
    """An open dimension."""
    return Size({((Term("symbol", (name,)), 1),): 1})


def unknown(*key: Any) -> Size:
    """A number of which nothing is known but that it is the same wherever it has the same key."""
    return Size({((Term("unknown", key), 1),): 1})


def whole(value: Any) -> Any:
    """A size of an axis; TypeError if it is neither a whole number nor a size."""
    return value if isinstance(value, Size) else index(value)


def is_constant(size: Any) -> bool:
    """Whether a size is a number."""
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
    exact = Fraction(float(value))  # OverflowError, ValueError for what is no number
    if exact.denominator > _FINEST:
        raise ValueError(f"products with {value} are rounded")
    return int(exact) if exact.denominator == 1 else exact


def _made(coefficients: Mapping[Monomial, Number]) -> Any:
    """A number or a size."""
    found = {m: _number(c) for m, c in coefficients.items() if c}
    if not found:
        return 0
    if len(found) == 1 and () in found:
        return found[()]
    if len(found) > _MOST_MONOMIALS:
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
    return _made(found)


def _joined(left: Monomial, right: Monomial) -> Monomial:
    if not left or not right:
        return left or right
    powers = dict(left)
    for term, power in right:
        powers[term] = powers.get(term, 0) + power
    return tuple(sorted(powers.items(), key=lambda item: item[0].key))


def divided(a: Any, b: Any) -> Any:
    """The exact quotient of two sizes where there is a polynomial one, None otherwise."""
    rest, divisor, quotient = dict(_coefficients(a)), _coefficients(b), dict[Monomial, Number]()
    if not divisor:
        return None
    lead = max(divisor, key=_order)
    for _ in range(_MOST_MONOMIALS):
        if not rest:
            return _made(quotient)
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


def _over(top: Monomial, lead: Monomial) -> Monomial | None:
    powers = dict(top)
    for term, power in lead:
        if powers.get(term, 0) < power:
            return None
        powers[term] -= power
    return tuple((term, power) for term, power in powers.items() if power)


def floor(value: Any) -> Any:
    """The value rounded down; what is whole comes out of the floor."""
    if not isinstance(value, Size):
        return math.floor(value)
    below = math.lcm(*(Fraction(c).denominator for c in value.coefficients.values()))
    if below == 1:
        return value
    top = {m: int(c * below) for m, c in value.coefficients.items()}
    whole = _made({m: c // below for m, c in top.items()})
    rest = _made({m: c % below for m, c in top.items()})
    if not isinstance(rest, Size):
        return whole  # what is less than one over something whole
    inner = [m[0][0] for m in rest.coefficients if len(m) == 1 and m[0][0].kind == "floor" and m[0][1] == 1]
    if len(inner) == 1 and rest.coefficients[((inner[0], 1),)] == 1:
        # floor((floor(p / q) + r) / s) = floor((p + q r) / (q s))
        size, under = inner[0].arguments
        others = rest - Size({((inner[0], 1),): 1})
        return whole + floor(_product(size + under * others, Fraction(1, under * below)))
    return whole + Size({((Term("floor", (rest, below)), 1),): 1})


def floor_divided(a: Any, b: Any) -> Any:
    """The quotient rounded down."""
    if not isinstance(b, Size):
        number = _number(b)
        if not number:
            raise ZeroDivisionError
        return floor(_product(a, Fraction(1) / number))
    exact = divided(a, b)
    return floor(exact) if exact is not None else Size({((Term("quotient", (a, b)), 1),): 1})


def least(a: Any, b: Any) -> Any:
    """The smaller of two sizes."""
    difference = _made(_summed(a, b, -1))
    if _is_at_least(difference, 0):
        return b
    if _is_at_least(_product(difference, -1), 0):
        return a
    pair = tuple(sorted((a, b), key=str))
    return Size({((Term("min", pair), 1),): 1})


def largest(a: Any, b: Any) -> Any:
    """The larger of two sizes."""
    return _made(_summed(_made(_summed(a, b)), least(a, b), -1))


def is_equal(a: Any, b: Any) -> Any:
    """Whether two sizes are equal; an unknown where it depends on the inputs."""
    difference = _made(_summed(a, b, -1))
    if not isinstance(difference, Size):
        return not difference
    if _is_at_least(difference, 1) or _is_at_least(_product(difference, -1), 1):
        return False
    return unknown("equal", difference)


def is_less(a: Any, b: Any) -> Any:
    """Whether one size is less than another; an unknown where it depends on the inputs."""
    if _is_at_least(_made(_summed(b, a, -1)), 1):
        return True
    if _is_at_least(_made(_summed(a, b, -1)), 0):
        return False
    return unknown("less", a, b)


def _is_at_least(value: Any, bound: int) -> bool:
    """Whether a size is never below a bound, as far as the signs of its coefficients tell."""
    if not isinstance(value, Size):
        return bool(value >= bound)
    lowest: Number = 0
    for monomial, coefficient in value.coefficients.items():
        if not monomial:
            lowest += coefficient
        elif coefficient < 0 or not all(_is_no_less_than_zero(term) for term, _ in monomial):
            return False
        elif all(term.kind == "symbol" for term, _ in monomial):
            lowest += coefficient
    return lowest >= bound


def _is_no_less_than_zero(term: Term) -> bool:
    if term.kind == "symbol":
        return True
    if term.kind == "quotient" and not _is_at_least(term.arguments[1], 1):
        return False
    return term.kind != "unknown" and all(_is_at_least(argument, 0) for argument in term.arguments)


def product(sizes: Iterable[Any]) -> Any:
    """The product of sizes."""
    sizes = list(sizes)
    if all(isinstance(size, int) for size in sizes):
        return math.prod(sizes)
    found: Any = 1
    for size in sizes:
        found = _product(found, size)
    return found


@dataclass
class Bindings:
    """What symbols and unknowns are under each of some bindings."""

    numbers: dict[Term, tuple[int, ...]] = field(default_factory=dict)
    _measured: dict[tuple[int, ...], Size] = field(default_factory=dict)
    _known: dict[tuple[Size, int], Number | None] = field(default_factory=dict)

    def bind(self, size: Size, numbers: tuple[int, ...]) -> Size:
        """Put on record what a symbol or unknown stands for."""
        (monomial,) = size.coefficients
        self.numbers.setdefault(monomial[0][0], numbers)
        return size

    def at(self, size: Any, binding: int) -> Number | None:
        """The number that a size is; None if it holds an unknown that has none."""
        if not isinstance(size, Size):
            return _number(size)
        if (size, binding) not in self._known:
            self._known[size, binding] = self._at(size, binding)
        return self._known[size, binding]

    def comes_to(self, size: Extent, numbers: tuple[int, ...]) -> bool:
        """Whether a size is these numbers under the bindings."""
        return all(self.at(size, binding) == number for binding, number in enumerate(numbers))

    def measure(self, place: tuple[Any, ...], numbers: tuple[int, ...], known: Iterable[Extent] = ()) -> Extent:
        """The expression of a size of which only the numbers are known: one of those at hand that comes to them.

        What is the same under all bindings is constant if nothing at hand is that depends on the inputs; sizes that
        agree under all of them are one, since operators demand it.
        """
        alike = [size for size in known if self.comes_to(size, numbers)]
        if alike:
            return min(alike, key=lambda size: isinstance(size, Size) and size.is_unsaid)
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


# Arithmetic on arrays of sizes, as nodes do it.


def computed_sizes(
    op_type: str, call: Call, inputs: list[Expressions | None], is_open: list[bool]
) -> list[Expressions]:
    """The outputs of a node on arrays of sizes; none where the operator has no such arithmetic.

    `is_open` says which inputs hold sizes that are no numbers.
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
    """An operand without sizes, as whole numbers."""
    return np.asarray(array.tolist(), np.int64).reshape(array.shape)


def objects(array: Array) -> Expressions:
    """Numbers as an array of objects."""
    found = np.empty(array.shape, object)
    found[...] = array.tolist() if array.ndim else array.item()
    return found


def _objects(found: Any) -> Expressions:
    is_done = isinstance(found, np.ndarray) and found.dtype == object
    return found if is_done else objects(np.asarray(found, object))


def _each(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda call, *arrays: np.frompyfunc(function, len(arrays), 1)(*arrays)


def _fold(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda call, *arrays: functools.reduce(np.frompyfunc(function, 2, 1), arrays)


def _quotient(call: Call, a: Expressions, b: Expressions) -> Any:
    """Division: rounded for whole numbers, which the call says."""
    if call.get("is_whole"):
        return np.frompyfunc(floor_divided, 2, 1)(a, b)
    return np.frompyfunc(_ratio, 2, 1)(a, b)


def _ratio(a: Any, b: Any) -> Any:
    exact = divided(a, b)
    if exact is None:
        raise NotImplementedError
    return exact


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


_SYMBOLIC: dict[str, Callable[..., Any]] = {
    "Add": _each(lambda a, b: a + b), "Sub": _each(lambda a, b: a - b), "Mul": _each(lambda a, b: a * b),
    "Div": _quotient, "Mod": _each(lambda a, b: a % b), "Neg": _each(lambda a: -a), "Floor": _each(floor),
    "Ceil": _each(lambda a: -floor(-a)), "Cast": _cast, "Sum": _fold(lambda a, b: a + b), "Min": _fold(least),
    "Max": _fold(largest), "Equal": _each(is_equal), "Less": _each(is_less),
    "Greater": _each(lambda a, b: is_less(b, a)),
    "LessOrEqual": _each(lambda a, b: _negated(is_less(b, a))),
    "GreaterOrEqual": _each(lambda a, b: _negated(is_less(a, b))), "Not": _each(_negated), "And": _each(_both),
    "Or": _each(_any), "Where": _each(_chosen), "ReduceProd": _reduced(lambda a, b: a * b),
    "ReduceSum": _reduced(lambda a, b: a + b), "ReduceMin": _reduced(least), "ReduceMax": _reduced(largest),
}  # fmt: skip  # a table
