"""The channel algebra: united indices are removed together, in whatever order they were united."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd_onnx.algebra.atoms import NOTHING, Atoms
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.algebra.reasons import Reason

STEP = st.tuples(
    st.sampled_from(["product", "tile", "repeat", "permute", "freeze", "unite", "unite", "unite"]),
    st.integers(0, 99),
    st.integers(0, 99),
)


def build(sizes: list[int], steps: list[tuple[str, int, int]]) -> tuple[Atoms, list[Any], list[tuple[Any, Any]]]:
    """Return atoms after some steps, all axes, and the pairs that were united."""
    atoms = Atoms()
    axes = [atoms.fresh(size) for size in sizes]
    united = []
    for what, first, second in steps:
        x, y = axes[first % len(axes)], axes[second % len(axes)]
        if what == "product" and len(x) * len(y) <= 144:
            axes.append(atoms.product(x, y))
        elif what in ("tile", "repeat") and len(x) < 50:
            axes.append(getattr(np, what)(x, 2 + second % 2))
        elif what == "permute":
            axes.append(np.random.default_rng(second).permutation(x))
        elif what == "freeze" and second % 3 == 0:
            atoms.freeze(x[: len(x) // 2], Reason("structure", "", "a reason"))
        elif what == "unite":
            y = next(a for a in axes[second % len(axes) :] + axes if len(a) == len(x))
            atoms.unite(x, y)
            united.append((x, y))
    return atoms, axes, united


def removed_with(atoms: Atoms, axis: Any) -> list[frozenset[int]]:
    """The primitives that delete each index."""
    return [frozenset(row) - {NOTHING} for row in atoms.parts(axis).tolist()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([2, 3, 4, 6, 12]), min_size=2, max_size=5), st.lists(STEP, max_size=14))
def test_what_was_united_has_one_fate(sizes: list[int], steps: list[tuple[str, int, int]]) -> None:
    atoms, _, united = build(sizes, steps)
    for left, right in united:
        assert removed_with(atoms, left) == removed_with(atoms, right)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([2, 3, 4, 6]), min_size=2, max_size=4), st.lists(STEP, max_size=10), st.integers(0, 2**31)
)
def test_methods_agree_with_parts(sizes: list[int], steps: list[tuple[str, int, int]], seed: int) -> None:
    """`canonical`, `is_frozen`, `all_frozen` and `KeepMask` agree with `parts`."""
    atoms, axes, _ = build(sizes, steps)
    removed = np.random.default_rng(seed).random(len(atoms)) < 0.3
    removed[NOTHING] = False
    keep = KeepMask(atoms, np.flatnonzero(removed))
    for axis in axes:
        parts = removed_with(atoms, axis)
        assert atoms.is_frozen(axis).tolist() == [not f for f in parts]
        assert atoms.all_frozen(axis) == (not any(parts))
        assert keep.mask(axis).tolist() == [not removed[list(f)].any() for f in parts]
        numbers: dict[int, frozenset[int]] = {}
        for number, f in zip(atoms.canonical(axis).tolist(), parts, strict=True):
            assert numbers.setdefault(number, f) == f
        assert len(set(numbers.values())) == len(numbers)


def test_a_product_splits_again() -> None:
    atoms = Atoms()
    heads, dims = atoms.fresh(4), atoms.fresh(3)
    merged = atoms.product(heads, dims)
    other = atoms.fresh(12)
    atoms.unite(other, merged)
    keep = KeepMask(atoms, heads[1:2])
    assert keep.mask(other).tolist() == [True] * 3 + [False] * 3 + [True] * 6


def test_frost_spreads_with_its_reason() -> None:
    atoms = Atoms()
    a, b = atoms.fresh(3), atoms.fresh(3)
    atoms.freeze(b[1:], Reason("interface", "", "is an output"))
    atoms.unite(a, b)
    assert atoms.is_frozen(a).tolist() == [False, True, True]
    assert atoms.reasons(a) == ["is an output"]
