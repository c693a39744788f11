"""Sizes as expressions: what is equal, what is constant, and what is neither."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd_onnx.ops.sizes import (
    Bindings,
    Size,
    Term,
    divided,
    floor,
    floor_divided,
    is_constant,
    is_equal,
    is_less,
    largest,
    least,
    objects,
    product,
    symbol,
    unknown,
)

H, W = symbol("h"), symbol("w")


def test_polynomials_have_one_form() -> None:
    assert (H + 1) * (H - 1) == H * H - 1
    assert H * W - W * H == 0
    assert hash((H + W) * 2) == hash(2 * W + 2 * H)
    assert H != W
    assert is_constant(H - H + 3)


def test_what_is_whole_comes_out_of_a_floor() -> None:
    assert (2 * H) // 2 == H
    assert (8 * H * W) // 8 == H * W
    assert (2 * H + 1) // 2 == H
    assert (H - 1) // 2 + 1 == (H + 1) // 2


def test_floors_of_floors_are_one() -> None:
    assert (H // 2) // 2 == H // 4
    assert ((H + 1) // 2 + 1) // 2 == (H + 3) // 4
    assert (H // 2 + W) // 3 == (H + 2 * W) // 6


def test_products_divide_exactly_or_not_at_all() -> None:
    assert divided(6 * H * W, 2 * H) == 3 * W
    assert divided((H + 1) * (W + 2), W + 2) == H + 1
    assert divided(H + 1, H) is None
    assert product([H, 3, W]) == 3 * H * W


@pytest.mark.parametrize(
    ("found", "constant"),
    [
        (least(8, H), False),
        (least(H + 3, H), False),
        (largest(H, 1), False),
        (least(H + 1, 1), True),
        (largest(H + 8, 4) - H, True),
        (least((H + 7) // 8, 1), True),
        (least(H // 8, 1), False),
        (least(least(H, W + 3), 1), True),
        (least((H + 7) // W, 1), False),
        (is_equal(H, 0), True),
        (is_equal(H, 1), False),
        (is_equal(H + 1, H), True),
        (is_less(H, H + 1), True),
        (is_less(H, 8), False),
        (is_less(H, 1), True),
        ((8 * H) // W, False),
        ((8 * H) // H, True),
    ],
)
def test_what_depends_on_the_inputs_is_no_constant(found: Any, constant: bool) -> None:
    assert is_constant(found) == constant


def test_products_that_are_rounded_are_not_written_down() -> None:
    """Ten times the float next to 1.3 is 13 in float32 and less than that on paper."""
    assert H * np.float32(1.5) == 3 * H * Fraction(1, 2)
    with pytest.raises(ValueError, match="are rounded"):
        H * np.float32(1.3)


def test_nobody_takes_a_size_for_a_truth() -> None:
    with pytest.raises(TypeError, match="depends on the inputs"):
        bool(H)


def test_an_unknown_has_the_numbers_that_it_was_bound_to() -> None:
    bindings = Bindings({Term("symbol", ("h",)): (3, 5)})
    assert [bindings.at(H * H + 1, binding) for binding in (0, 1)] == [10, 26]
    other = unknown("place")
    assert bindings.at(other, 0) is None
    assert bindings.at(bindings.bind(other, (7, 9)) + H, 1) == 14
    assert other.has_unknowns
    assert not H.has_unknowns


def test_what_is_cut_at_a_size_is_no_larger_than_it() -> None:
    cut = least(64, H)
    assert least(cut, H) == least(H, cut) == cut
    assert largest(H, cut) == H
    assert largest(H, least(cut, 8)) == H
    assert largest(H, cut + 1) != H


def test_numbers_become_objects() -> None:
    found = objects(np.asarray([[1, 2], [3, 4]]))
    assert found.dtype == object
    assert found.tolist() == [[1, 2], [3, 4]]
    assert objects(np.asarray(7)).item() == 7
    assert objects(np.zeros((1, 2, 0, 3))).shape == (1, 2, 0, 3)


_LEAVES = st.sampled_from([1, 2, 3, 4, 8, "h", "w"])
_TREES = st.recursive(_LEAVES, lambda inner: st.tuples(st.sampled_from("+-*/m"), inner, inner), max_leaves=8)


def _value(tree: Any, leaves: dict[str, Any]) -> Any:
    """What an expression comes to, on numbers or on sizes."""
    if not isinstance(tree, tuple):
        return leaves[tree] if isinstance(tree, str) else tree
    kind, left, right = tree[0], _value(tree[1], leaves), _value(tree[2], leaves)
    if kind == "/":
        return floor_divided(left, right)
    if kind == "m":
        return least(left, right)
    return {"+": left + right, "-": left - right, "*": left * right}[kind]


@settings(deadline=None)
@given(_TREES)
def test_expressions_come_to_what_their_numbers_come_to(tree: Any) -> None:
    try:
        size = _value(tree, {"h": H, "w": W})
    except ZeroDivisionError:
        return
    for h, w in itertools.product((1, 2, 3, 8, 13), (1, 4, 7)):
        bindings = Bindings({Term("symbol", ("h",)): (h,), Term("symbol", ("w",)): (w,)})
        try:
            expected = _value(tree, {"h": h, "w": w})
        except ZeroDivisionError:
            continue
        found = bindings.at(size, 0)
        assert found is None or found == expected
        assert isinstance(size, Size) or floor(size) == expected
