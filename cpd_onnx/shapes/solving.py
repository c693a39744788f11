"""Sizes of inputs that a file leaves open and its operators require, solved from equations."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from cpd_onnx.ops.required import Equation
from cpd_onnx.ops.sizes import Bindings, Size, symbol

_MOST = 4096
"""Largest number that is tried for a symbol of an equation that is not linear (heuristic: sizes of images)."""
_PAIR = 2
"""Number of symbols of an equation up to which it is solved; both are then equal, as in square images."""


def solved(equations: Iterable[Equation]) -> dict[str, int]:
    """Return numbers for symbols that fulfil equations without unknowns, by the name of the symbol.

    Equations with one symbol come first. Of several solutions, a small and round one is taken; an equation that has
    none, or whose symbols were solved from another one, is left out.
    """
    found: dict[str, int] = {}
    for size, number in sorted(dict.fromkeys(equations), key=lambda equation: len(equation[0].symbols)):
        names = size.symbols
        if not 0 < len(names) <= _PAIR or not names.isdisjoint(found):
            continue
        if (root := _linear_root(size, number) or _roundest_root(size, number, names)) is not None:
            found |= dict.fromkeys(sorted(names), root)
    return found


def _linear_root(size: Size, number: int) -> int | None:
    """Return the positive integer at which a multiple of one symbol plus a constant has a value; None without one."""
    parts = [(monomial, factor) for monomial, factor in size.coefficients.items() if monomial]
    if len(parts) != 1:
        return None
    (((term, power), *others), factor) = parts[0]
    if others or power != 1 or term.kind != "symbol":
        return None
    root = (number - size.coefficients.get((), 0)) / factor
    return int(root) if root >= 1 and root == int(root) else None


def _roundest_root(size: Size, number: int, names: Iterable[str]) -> int | None:
    """Return a number of all symbols at which a size has a value; None if there is none.

    A quotient that is rounded has it at a range of numbers. Of the first range the number with the largest power of two
    as a factor is taken (heuristic): models are exported at such sizes of images, which later operators require too.
    """
    terms = [next(iter(symbol(name).coefficients))[0][0] for name in names]

    def fits(root: int) -> bool:
        return Bindings(dict.fromkeys(terms, (root,))).at(size, 0) == number

    first = next((root for root in range(1, _MOST + 1) if fits(root)), None)
    if first is None:
        return None
    return max(takewhile(fits, range(first, _MOST + 1)), key=lambda root: (root & -root, -root))
